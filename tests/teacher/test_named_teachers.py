"""What may be said of several teachers, by settings and by rows, and what is refused."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from observe import logged
from several_teachers import named
from tiny import messages_dataset

from amid_trl import AMiDConfig, cli
from amid_trl.data.row_teachers import own_rows
from amid_trl.teacher.reach import check_reach


def test_a_name_that_is_not_configured_is_an_error_with_the_row(several):
    rows = named(messages_dataset(8)).to_list()
    rows[5]["teacher"] = "maths"
    with pytest.raises(ValueError, match=r"row 5 of the train dataset is of the teacher 'maths'.*mean 'math'\?"):
        several(train_dataset=Dataset.from_list(rows))
    rows[5]["teacher"] = None
    with pytest.raises(ValueError, match="row 5 of the train dataset names no teacher: give it one of math, chat"):
        several(train_dataset=Dataset.from_list(rows))
    with pytest.raises(ValueError, match="row 0 of the eval dataset names no teacher"):
        several(eval_dataset=messages_dataset(2))


def test_a_row_without_a_name_belongs_to_default(several, pair):
    trainer = several(teacher_model={**pair, "default": pair["chat"]}, train_dataset=messages_dataset(4))
    assert trainer.train_dataset["teacher"] == ["default"] * 4
    assert next(iter(trainer.get_train_dataloader()))["teacher"].tolist() == [2, 2]


@pytest.mark.parametrize("names", [None, ["math", None, "", "default"]], ids=["no column", "names"])
def test_whose_a_row_is_where_it_names_nobody(names):
    """A dataset that is not prepared keeps what it says; a server is asked about its own rows alone."""
    columns = ("teacher_input_ids", "teacher_labels", "teacher_prompt_ids")
    rows = Dataset.from_dict({name: [[1] * 9, [1] * 9, [1] * 20, [1] * 9] for name in columns})
    rows = rows if names is None else rows.add_column("teacher", names)
    assert own_rows(rows, "default") == ([0, 1, 2, 3] if names is None else [1, 2, 3])
    assert own_rows(rows, "math") == ([] if names is None else [0])
    assert own_rows(rows, "") == [0, 1, 2, 3]
    args = SimpleNamespace(teacher_model_server_url="http://a", max_new_tokens=1)
    for name in ("default", "math"):
        of = SimpleNamespace(args=args, teacher=name)
        refused = pytest.raises(ValueError, match="row 2 of the train dataset") if name == "default" else nullcontext()
        with refused:
            check_reach(of, {"train": rows}, 10, generates=False)


def test_a_collator_of_ones_own_gives_numbers(several, tokenizer):
    from amid_trl.data.batches import DistillationCollator

    def collate(rows, **more):
        ids = [tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"] for row in rows]
        batch = DistillationCollator(tokenizer.pad_token_id)([{"input_ids": x, "labels": x} for x in ids])
        return batch | more

    with pytest.raises(ValueError, match="has no 'teacher', the number of each row's teacher: 0 is 'math', 1 is 'cha"):
        several(data_collator=collate).train()
    with pytest.raises(ValueError, match=r"there are 2 teachers, but a batch has the numbers \[2, 2\]"):
        several(data_collator=lambda rows: collate(rows, teacher=torch.tensor([2, 2]))).train()
    trainer = several(data_collator=lambda rows: collate(rows, teacher=torch.tensor([1, 0])))
    trainer.train()
    assert logged(trainer, "kl/math") and logged(trainer, "kl/chat")


A = {"teacher_model_name_or_path": "a"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teachers": {}}, "teachers must be a dict of at least one teacher"),
        ({"teachers": {"a.b": A}}, r"a name has letters, digits, - and _ alone.*got 'a\.b'"),
        ({"teachers": {"student": A}}, "no teacher may be called 'student'"),
        ({"teachers": {"math": "a"}}, "teachers: math: must be a dict of fields; got 'a'"),
        (
            {"teachers": {"math": {"teacher_name_or_path": "a"}}},
            "'teacher_name_or_path' is no .* mean teacher_model_name",
        ),
        (
            {"teachers": {"math": {"teacher_model": "a"}}},
            "'teacher_model' is no .* did you mean teacher_model_name_or_path",
        ),
        ({"teachers": {"math": {"sft_weight": 1.0}}}, "teachers: math: 'sft_weight' is no field of a teacher"),
        ({"teachers": {"math": {**A, "teacher_offload": "yes"}}}, "math: teacher_offload must be bool; got 'yes'"),
        ({"teachers": {"math": {**A, "distill_temperature": 0}}}, "math: distill_temperature must be a positive"),
        ({"teachers": {"math": {**A, "objective": "kl"}}}, "teachers: math: objective must be one of"),
        ({"teachers": {"math": {**A, "objective": "skl", "objective_kwargs": {"k": 1}}}}, "math: objective_kwargs"),
        ({"teachers": {"math": {**A, "beta": 0.3}}}, "teachers: math: beta has no effect on objective='amid'"),
        (
            {"teachers": {"math": {**A, "teacher_model_server_url": "http://a"}}},
            "teachers: math: teacher_model_name_or_path has no effect beside teacher_model_server_url",
        ),
        (
            {"teachers": {"math": {"teacher_cache": "a"}}, "lmbda": 0.5},
            "math: teacher_cache holds the teacher's answer",
        ),
        ({"teachers": {"math": A}, "teacher_offload": True}, "teacher_offload has no effect beside teachers; give it"),
        ({"teachers": {"math": A}, "seq_kd": True}, "seq_kd=True has one teacher write the text"),
        (
            {"teachers": {"math": {**A, "objective": "kd"}}, "assistant_alpha": 1.0},
            "assistant_alpha has no effect where each of the teachers has an objective of its own",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_by_teacher_and_field(settings, message):
    with pytest.raises(ValueError, match=message):
        AMiDConfig("unused", use_cpu=True, bf16=False, **settings)


def test_a_model_is_needed_for_each_and_by_name(train, several, pair):
    with pytest.raises(
        ValueError, match=r"teachers: chat: teacher_model \(or args.teacher_model_name_or_path\) is mis"
    ):
        several(teacher_model={"math": pair["math"]}, teachers={"math": {}, "chat": {}})
    with pytest.raises(ValueError, match="teacher_model is one model, and there are teachers by name"):
        train(teachers={"math": {}})
    with pytest.raises(ValueError, match="teachers: math: the teacher is given twice"):
        several(teachers={"math": {"teacher_model_server_url": "http://a"}})


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ({"math": {"teacher_offload": True}}, "teachers: math: teacher_model_name_or_path is missing"),
        ({"math": {"teacher_cache": "/nowhere"}}, "teachers: math: teacher_cache: there is no folder /nowhere"),
        (
            {"math": {**A, "objective": "skl", "objective_kwargs": {"kew": 1}}},
            "math: objective_kwargs of skl may have",
        ),
    ],
)
def test_the_command_refuses_them_in_one_line(teachers, message, capsys):
    flags = ["--model_name_or_path", "a/b", "--dataset_name", "a/b", "--output_dir", "unused", "--lmbda", "0.0"]
    assert cli.main(["train", *flags, "--use_cpu", "--bf16", "False", "--teachers", json.dumps(teachers)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_landscape_is_of_one_teacher(several):
    from amid_trl.choosing.tokens import trained_tokens

    with pytest.raises(ValueError, match="a landscape is of one teacher, and there are math, chat"):
        trained_tokens(several())


def test_a_column_of_that_name_is_data_where_one_teacher_has_all_rows(train):
    trainer = train(train_dataset=named(messages_dataset(8)))
    assert trainer.train_dataset.column_names == ["input_ids", "labels", "prompt_ids"]
    trainer.train()
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith("kl/")]
