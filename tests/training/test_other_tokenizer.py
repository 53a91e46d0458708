"""A teacher with another tokenizer, in the trainer."""

import shutil

import pytest
import torch
from datasets import Dataset
from observe import logged
from small_tokenizers import (
    backwards,
    byte_fallback,
    in_order,
    lossy,
    other_ends,
    other_order,
    renumbered,
    spaces_by,
    special_first,
)
from tiny import (
    CHATML,
    QUESTIONS,
    messages_dataset,
    multi_turn_dataset,
    pretokenised_dataset,
    prompt_completion_dataset,
    prompt_only_dataset,
    save_tiny,
    text_dataset,
    tiny_llama,
)
from tokenizers import normalizers

from amid_trl.maths.outcomes import UNPAIRED
from amid_trl.models.vocabulary import first_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher for one tokenizer, the same one for another, each with its tokenizer; and one of fewer merges."""
    folder, one, two = tmp_path_factory.mktemp("pair"), in_order(), other_order()
    two.chat_template += "{#- its own -#}"  # so that it reads prompts of its own
    teacher = tiny_llama(one, seed=1, hidden_size=48)
    save_tiny(folder / "same", teacher, one)
    save_tiny(folder / "other", renumbered(teacher, one, two), two)
    third = first_tokens(special_first(), 330).tokenizer
    save_tiny(folder / "another", tiny_llama(third, seed=1, hidden_size=48), third)
    return folder


DATASETS = {
    "chats": messages_dataset,
    "completions": prompt_completion_dataset,
    "text": text_dataset,
    "answers in several spans": lambda: pretokenised_in_spans(in_order()),
}


def pretokenised_in_spans(tokenizer) -> Dataset:
    rows = []
    for row in pretokenised_dataset(tokenizer, 8):
        labels = list(row["labels"])
        labels[-3] = -100
        rows.append({**row, "labels": [row["input_ids"][0], row["input_ids"][1], *labels[2:]]})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_same_tokens_with_other_numbers_give_the_dense_loss(train, folder, dataset):
    """Every trained token has its loss, the first of an answer too, and none is counted twice."""
    tokenizer, rows = in_order(), DATASETS[dataset]()
    found = []
    for teacher in ("same", "other"):
        student = tiny_llama(tokenizer, seed=0)
        trainer = train(
            model=student,
            teacher_model=str(folder / teacher),
            processing_class=tokenizer,
            train_dataset=rows,
            eval_dataset=rows,
            sft_weight=0.5,
        )
        figures = trainer.evaluate()
        trainer.train()
        found.append((figures, logged(trainer, "loss"), student.lm_head.weight.detach()))
    (dense, losses, weight), (other, others, weight_of_other) = found
    assert other["eval_aligned"] == 1 and other["eval_student_rest_mass"] < 1e-6
    for name in ("eval_loss", "eval_kl", "eval_nll", "eval_top1_agreement", "eval_teacher_entropy"):
        assert other[name] == pytest.approx(dense[name], abs=1e-5)
    assert others == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(weight_of_other, weight, atol=1e-5, rtol=1e-4)


# A chat whose turns are special tokens, which stand in the middle of every row.
TURNS = (
    "{%- for message in messages %}{{ '<s>' + message['content'] + '</s>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<s>' }}{%- endif %}"
)
SENTENCEPIECE = {"prepend": byte_fallback, "first": lambda: spaces_by("first"), "always": lambda: spaces_by("always")}


@pytest.mark.parametrize(
    ("name", "prompts", "template"),
    [
        *(
            (name, prompts, TURNS)
            for name in ("prepend", "first")
            for prompts in ("its own", "teacher_prompt", "the row", "text or the row")
        ),
        ("always", "its own", TURNS),
        ("prepend", "teacher_prompt", CHATML),
    ],
    ids=lambda value: "chatml" if value == CHATML else None,
)
def test_two_equal_sentencepiece_tokenizers_give_the_dense_loss(train, tmp_path, name, prompts, template):
    """With special tokens in the row, whatever the teacher reads before an answer."""
    tokenizer = SENTENCEPIECE[name]()
    tokenizer.chat_template = template
    other = backwards(tokenizer)
    teacher = tiny_llama(tokenizer, seed=1)
    save_tiny(tmp_path / "same", teacher, tokenizer)
    turned = renumbered(teacher, tokenizer, other)
    rows = messages_dataset(4)
    if prompts in ("the row", "text or the row"):
        other.chat_template = None
    if prompts != "its own" and prompts != "the row":
        hints = [f"A hint: {row['messages'][0]['content'].lower()}" for row in rows]
        read = hints[:2] + 2 * [None]
        if prompts == "teacher_prompt":
            read = [[{"role": "user", "content": hint}] for hint in hints]
        rows = rows.add_column("teacher_prompt", read)
    save_tiny(tmp_path / "other", turned, other)
    found = []
    for kind in ("same", "other"):
        student = tiny_llama(tokenizer, seed=0)
        given = {"model": student, "teacher_model": str(tmp_path / kind), "processing_class": tokenizer}
        trainer = train(**given, train_dataset=rows, max_steps=1)
        trainer.train()
        found.append((logged(trainer, "loss"), student.lm_head.weight.detach()))
    assert logged(trainer, "aligned") == [1] and logged(trainer, "teacher_rest_mass")[0] < 1e-6
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-5, rtol=1e-4)


def test_a_chat_of_which_prompt_and_answer_share_a_token_gives_the_dense_loss(train, folder, tmp_path):
    """The prompt ends in a space, which is the first token's of an answer."""
    tokenizer, other = in_order(), other_order()
    template = CHATML.replace("assistant\n'", "assistant '").replace("'\n' + message", "' ' + message")
    tokenizer.chat_template = other.chat_template = template
    rows = answers_of("water is wet.", "数 is the water.")
    assert (
        tokenizer("assistant water")["input_ids"][: len(tokenizer("assistant ")["input_ids"])]
        != (tokenizer("assistant ")["input_ids"])
    )
    found = []
    for kind, its in (("same", tokenizer), ("other", other)):
        shutil.copytree(folder / kind, tmp_path / kind)
        its.save_pretrained(tmp_path / kind)
        student = tiny_llama(tokenizer, seed=0)
        given = {"model": student, "teacher_model": str(tmp_path / kind), "processing_class": tokenizer}
        trainer = train(**given, train_dataset=rows, max_steps=1)
        trainer.train()
        found.append((logged(trainer, "loss"), student.lm_head.weight.detach()))
    assert logged(trainer, "aligned") == [1]
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-5, rtol=1e-4)


def answers_of(*answers: str) -> Dataset:
    asked = {"role": "user", "content": "Is it wet?"}
    return Dataset.from_list([{"messages": [asked, {"role": "assistant", "content": answer}]} for answer in answers])


# As Llama 2's: the text of an answer stands behind a space.
INST = (
    "{%- for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("builds", "positions"),
    [
        ((in_order, special_first), 512),
        ((in_order, special_first), 40),
        ((special_first, byte_fallback), 512),
        ((byte_fallback, special_first), 512),
    ],
)
def test_tokens_and_bytes_are_those_of_the_trained_text(train, tmp_path, builds, positions):
    """Also where the teacher reads a part of it; the first token of an answer is one of those that are compared."""
    student, teacher = (build() for build in builds)
    for tokenizer in (student, teacher):
        if tokenizer.bos_token:
            tokenizer.chat_template = INST
    teacher.chat_template += "{#- its own -#}"
    model = tiny_llama(teacher, seed=1, max_position_embeddings=positions)
    save_tiny(tmp_path / "teacher", model, teacher)
    given = {"model": tiny_llama(student, seed=0), "teacher_model": str(tmp_path / "teacher")}
    trainer = train(**given, processing_class=student, eval_dataset=messages_dataset(8))
    figures, answers = trainer.evaluate(), [answer for _, answer in QUESTIONS]
    size = sum(len(answer.encode()) for answer in answers)
    for name, tokenizer in (("student", student), ("teacher", teacher)):
        tokens = sum(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1 for answer in answers)
        assert figures[f"eval_{name}_tokens_per_byte"] == pytest.approx(tokens / size, rel=1e-6)
    if positions == 512:
        columns = ("teacher_input_ids", "teacher_labels", "teacher_prompt_ids")
        asked = [trainer.teacher._row(*(row[name] for name in columns))[1] for row in trainer.train_dataset]
        assert figures["eval_aligned"] > 0.9 and all(places[0].kind != UNPAIRED for places in asked)


def test_a_row_of_text_that_the_student_cannot_write_is_counted(train, tmp_path):
    """Behind what it has not read the teacher says nothing."""
    tokenizer, teacher = lossy(), special_first()
    teacher.chat_template = None
    save_tiny(tmp_path / "teacher", tiny_llama(teacher, seed=1), teacher)
    rows = Dataset.from_list(
        [{"prompt": prompt, "completion": " Yes, water is wet."} for prompt in ("Is water wet?", "Is ☃ wet?")]
    )
    model = tiny_llama(tokenizer, seed=0, vocab_size=max(tokenizer.get_vocab().values()) + 1)
    given = {"model": model, "teacher_model": str(tmp_path / "teacher"), "processing_class": tokenizer}
    trainer = train(**given, train_dataset=rows, eval_dataset={"all": rows, "read": rows.select([0])}, max_steps=1)
    trainer.train()
    assert logged(trainer, "unaligned_rows") == [1] and logged(trainer, "aligned")[0] == pytest.approx(0.5, abs=0.1)
    figures = trainer.evaluate()
    of_both, of_read = (figures[f"eval_{name}_teacher_tokens_per_byte"] for name in ("all", "read"))
    assert of_both == pytest.approx(of_read), "of the bytes that the teacher has read"


def test_a_teacher_whose_tokenizer_has_more_tokens_than_it_is_named(train, tmp_path):
    other = special_first()
    save_tiny(tmp_path / "cut", tiny_llama(other, seed=1, vocab_size=len(other) - 5), other)
    tokenizer = in_order()
    given = {"model": tiny_llama(tokenizer, seed=0), "processing_class": tokenizer}
    named = r"the teacher's tokenizer .*cut has token ids up to 482 but the teacher's vocab_size is 478; resize the "
    with pytest.raises(ValueError, match=named + "teacher's embeddings, or give teacher_tokenizer_name_or_path"):
        train(**given, teacher_model=str(tmp_path / "cut"))


def settings(folder, **others):
    tokenizer = in_order()
    model = tiny_llama(tokenizer, seed=0)
    return {"model": model, "teacher_model": str(folder / "another"), "processing_class": tokenizer, **others}


def test_what_is_logged(train, folder, caplog):
    trainer = train(**settings(folder, eval_dataset=messages_dataset(8)))
    made = type(trainer.processing_class).__name__  # it has no path
    assert f"another tokenizer ({folder / 'another'}) than the student ({made}): it reads" in caplog.text
    figures = trainer.evaluate()
    assert 0.9 < figures["eval_aligned"] <= 1 and 0 <= figures["eval_teacher_rest_mass"] < 1
    nats = figures["eval_nll"] * figures["eval_student_tokens_per_byte"]
    assert figures["eval_bits_per_byte"] == pytest.approx(nats / torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    assert 0.1 < figures["eval_teacher_tokens_per_byte"] < 1


def test_the_split_into_micro_batches_changes_nothing(train, folder):
    weights = []
    for rows, steps in ((4, 1), (1, 4), (2, 2)):
        given = settings(folder, per_device_train_batch_size=rows, gradient_accumulation_steps=steps, optim="sgd")
        trainer = train(**given, learning_rate=1.0, max_steps=1)
        trainer.train()
        weights.append(given["model"].lm_head.weight.detach())
    torch.testing.assert_close(weights[1], weights[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(weights[2], weights[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "others",
    [
        {"lmbda": 1.0, "train_dataset": prompt_only_dataset(4)},
        {"lmbda": 0.5, "objective": "taid", "assistant_lambda_schedule": {"kind": "taid"}},
        {
            "train_dataset": multi_turn_dataset(4),
            "assistant_alpha_schedule": {"kind": "linear", "start": -5, "end": 1},
        },
    ],
    ids=["student text", "taid", "schedule"],
)
def test_it_trains_with(train, folder, others):
    trainer = train(**settings(folder, **others))
    trainer.train()
    assert len(logged(trainer, "loss")) == 2 and all(share > 0.5 for share in logged(trainer, "aligned"))


def test_a_resumed_run_ends_like_the_uninterrupted_one(train, folder, tmp_path):
    ends = []
    for resumes in (False, True):
        given = settings(folder, max_steps=4, save_strategy="steps", save_steps=2, lmbda=0.5)
        trainer = train(**given)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2") if resumes else None)
        ends.append(given["model"].lm_head.weight.detach())
    torch.testing.assert_close(*ends)


def test_a_dataset_without_one_shared_boundary_is_refused(train, folder, tmp_path):
    other = special_first()
    short = save_tiny(tmp_path / "short", tiny_llama(other, seed=1, max_position_embeddings=4), other)
    given = settings(folder) | {"teacher_model": str(short)}
    with pytest.raises(ValueError, match="share no boundary of their tokens at a trained token in any of the 8 rows"):
        train(**given)


def test_a_row_without_a_shared_boundary_is_counted_and_named(train, folder, tmp_path, caplog):
    other = special_first()
    short = save_tiny(tmp_path / "short", tiny_llama(other, seed=1, max_position_embeddings=16), other)
    rows = Dataset.from_list(
        [{"prompt": prompt, "completion": " Yes, water is wet."} for prompt in ("Is water wet?", "wet water " * 12)]
    )
    trainer = train(**settings(folder) | {"teacher_model": str(short), "train_dataset": rows, "max_steps": 1})
    trainer.train()
    assert logged(trainer, "unaligned_rows") == [1] and "wet water wet water" in caplog.text


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({"seq_kd": True}, "seq_kd=True needs a teacher with the student's tokenizer"),
        ({"distill_temperature": 2.0}, "distill_temperature=2.0 needs a teacher with the student's tokenizer"),
        ({"token_selection": "tip"}, "token_selection='tip' needs a teacher with the student's tokenizer"),
    ],
)
def test_what_needs_the_students_tokens_is_refused_by_name(train, folder, others, named):
    with pytest.raises(ValueError, match=named):
        train(**settings(folder, **others))


def test_one_of_several_by_name_is_refused_by_its_name(train, folder):
    rows = messages_dataset(4).map(lambda row, index: {"teacher": ("math", "chat")[index % 2]}, with_indices=True)
    teachers = {
        "math": {"teacher_model_name_or_path": str(folder / "same")},
        "chat": {"teacher_model_name_or_path": str(folder / "another")},
    }
    with pytest.raises(ValueError, match="teachers: chat: it has another tokenizer than the student"):
        train(**settings(folder) | {"teacher_model": None}, has_teacher=False, teachers=teachers, train_dataset=rows)


@pytest.mark.parametrize(
    "teacher",
    [{"teacher_adapter_path": "base"}, {"teacher_ema": 0.9}, {"teacher_model_server_url": "http://localhost:1"}],
)
def test_a_tokenizer_for_a_teacher_that_is_no_model_here_is_refused(train, folder, teacher):
    [name] = teacher
    with pytest.raises(ValueError, match=f"teacher_tokenizer_name_or_path has no effect beside {name}"):
        train(has_teacher=False, teacher_tokenizer_name_or_path=str(folder / "another"), **teacher)


@pytest.mark.parametrize("arranged", [{"padding_free": True}, {"packing": True, "max_length": 256}])
def test_rows_without_padding_give_the_loss_of_padded_ones(train, folder, arranged):
    """The one step reads all of the dataset, however it lies in bins."""
    found = []
    for how in ({}, arranged):
        given = settings(folder, **how, train_dataset=messages_dataset(4), max_steps=1, optim="sgd")
        trainer = train(**given, per_device_train_batch_size=4)
        trainer.train()
        found.append((logged(trainer, "loss"), given["model"].lm_head.weight.detach()))
    (loss, weight), (other, weight_of_other) = found
    assert other == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(weight_of_other, weight, atol=1e-6, rtol=1e-4)


def test_where_the_generation_configs_of_both_stop_a_text_ends(train, folder, tmp_path):
    """Not only with the EOS that either tokenizer has, which ends a turn."""
    other, given = other_ends(), settings(folder)
    tokenizer, student, teacher = given["processing_class"], given["model"], tiny_llama(other, seed=1)
    ours, theirs = (
        each.convert_tokens_to_ids(list(ends))
        for each, ends in ((tokenizer, ("<|im_end|>", "<|endoftext|>")), (other, ("<|eot_id|>", "<|end_of_text|>")))
    )
    student.generation_config.eos_token_id, teacher.generation_config.eos_token_id = ours, theirs
    save_tiny(tmp_path / "teacher", teacher, other)
    outcomes = train(**given | {"teacher_model": str(tmp_path / "teacher")}).teacher.outcomes
    found = outcomes.student[ours].tolist()
    assert found == outcomes.teacher[theirs].tolist() and len({*found, outcomes.rest}) == 3


def test_a_cache_of_such_a_teacher_is_refused(train, folder, tmp_path):
    with pytest.raises(ValueError, match=r"teacher_cache=.* needs a teacher with the student's tokenizer"):
        train(**settings(folder, teacher_cache=str(tmp_path / "cache"), teacher_cache_fill=True))


def test_a_tokenizer_that_changes_text_is_refused_by_name(train, folder, tmp_path):
    lower = special_first()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    save_tiny(tmp_path / "lower", tiny_llama(lower, seed=1), lower)
    unread = Dataset.from_list([{"no": "text"}])  # it is refused before a text is looked at
    with pytest.raises(ValueError, match=r"lower changes text"):
        train(**settings(folder) | {"teacher_model": str(tmp_path / "lower"), "train_dataset": unread})


def test_a_teacher_in_memory_has_it_by_name(train, folder):
    other = first_tokens(special_first(), 330).tokenizer
    given = settings(folder, teacher_tokenizer_name_or_path=str(folder / "another"))
    trainer = train(**given | {"teacher_model": tiny_llama(other, seed=1)})
    trainer.train()
    assert logged(trainer, "aligned")[0] > 0.5
