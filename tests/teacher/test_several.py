"""Several teachers: each row is compared with its own, whatever shares its micro-batch."""

import copy
import json

import pytest
import torch
from observe import LORA, Windows, logged, weights
from peft import LoraConfig
from several_teachers import MATH_ROWS, named
from states_server import hosting
from tiny import messages_dataset, multi_turn_dataset, pretokenised_dataset, save_tiny, tiny_llama
from transformers import AutoModelForCausalLM

from amid_trl.models.heads import causal_lm
from amid_trl.teacher.cache import TeacherCache
from amid_trl.teacher.in_memory import HostWeights
from amid_trl.teacher.several import Teachers


MEANS = ("objective", "nll", "kl", "top1_agreement", "student_entropy", "teacher_entropy")


def by_hand(student, teachers: list, objectives: list, batch: dict) -> torch.Tensor:
    """Σ over trained tokens of each row's objective on the logits of its own teacher."""
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    total = torch.zeros((), dtype=torch.float64)
    for row, number in enumerate(batch["teacher"].tolist()):
        ids = {name: column[row : row + 1] for name, column in tokens.items()}
        trained = batch["labels"][row : row + 1, 1:] != -100
        q, p = (model(**ids).logits[:, :-1][trained] for model in (student, teachers[number]))
        total = total + objectives[number](q, p.detach()).sum()
    return total


# ---- The loss ----


@pytest.mark.parametrize("own", [{}, {"chat": {"objective": "kd", "distill_temperature": 2.0}}])
def test_the_gradient_of_a_window_is_that_of_each_rows_own_teacher(several, tokenizer, pair, own):
    student = tiny_llama(tokenizer).double()
    pair = {name: model.double() for name, model in pair.items()}
    trainer = several(
        model=student,
        teacher_model=pair,
        teachers={"math": {}, "chat": {}, **own},
        train_dataset=named(multi_turn_dataset(8)),
        per_device_train_batch_size=8,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch["teacher"].tolist()) == {0, 1}
    trained = (batch["labels"][:, 1:] != -100).sum()
    objectives = [*trainer._parts.objectives.current.values()]
    assert (objectives[0] == objectives[1]) == (not own)
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=trained).backward()
    got = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    (by_hand(student, [*pair.values()], objectives, batch) / trained).backward()
    for mine, parameter in zip(got, student.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-7, atol=1e-12)


def test_two_that_are_one_are_one_digit_for_digit(train, tokenizer, teacher):
    one, two = (
        train(
            model=tiny_llama(tokenizer),
            teacher_model=teachers,
            train_dataset=named(messages_dataset(8), math=(0, 1, 4, 5)),
            train_sampling_strategy="sequential",
            eval_dataset=named(messages_dataset(2), math=(0, 1)),
            max_steps=4,
        )
        for teachers in (teacher, {"math": teacher, "chat": copy.deepcopy(teacher)})
    )
    for trainer in (one, two):
        trainer.train()
        trainer.evaluate()
    assert one.teacher_model is teacher and (two.teacher, two.teacher_model, two.objective) == (None, None, None)
    for name in ("loss", "grad_norm", "kl", "nll", "eval_loss", "eval_kl"):
        assert logged(one, name) == logged(two, name), name
    for name, weight in weights(one.model).items():
        assert torch.equal(weight, weights(two.model)[name])
    # Each window here is of one teacher, so that its figures are the window's.
    assert [entry.get("kl/math", entry.get("kl/chat")) for entry in two.state.log_history[:4]] == logged(two, "kl")


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_any_split_of_a_window_gives_the_same_numbers(several, tokenizer, lmbda):
    def one_step(batch_size: int, accumulation: int) -> dict[str, list[float]]:
        trainer = several(
            **{"model": tiny_llama(tokenizer), "lmbda": lmbda, "top_k": 1, "max_steps": 1},
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        names = ["loss", "grad_norm", "kl", *(f"{name}/{of}" for name in MEANS for of in ("math", "chat"))]
        assert all(len(logged(trainer, name)) == 1 for name in names)
        return {name: logged(trainer, name) for name in names}

    whole = one_step(8, 1)
    for split in ((1, 8), (2, 4)):
        assert one_step(*split) == {name: pytest.approx(value, rel=1e-5) for name, value in whole.items()}


def test_figures_are_of_each_teachers_tokens_in_training_and_in_evaluation(several, train, tokenizer, pair):
    rows = named(messages_dataset(6), math=(0, 3))
    trainer = several(eval_dataset=rows, train_dataset=rows, per_device_eval_batch_size=4)
    found = trainer.evaluate()
    for name, teacher in pair.items():
        alone = rows.filter(lambda row, name=name: row["teacher"] == name)
        single = train(model=trainer.model, teacher_model=teacher, train_dataset=alone, eval_dataset=alone).evaluate()
        for figure in MEANS:
            assert found[f"eval_{figure}/{name}"] == pytest.approx(single[f"eval_{figure}"], rel=1e-5), figure


def test_one_of_likeliest_tokens_beside_one_in_memory(several, train, tokenizer, pair, tmp_path):
    """The tail of the one that is known as a whole is empty."""
    from amid_trl.training.fill_cache import cache_teacher

    rows, cache = named(messages_dataset(8)), str(tmp_path / "cache")
    cache_teacher(train(teacher_model=pair["math"], train_dataset=rows), cache, 360, "float32")
    teachers = {"math": {"teacher_cache": cache, "teacher_top_k": 360}, "chat": {}}
    trainer = several(
        model=tiny_llama(tokenizer), teacher_model={"chat": pair["chat"]}, teachers=teachers, max_steps=4
    )
    whole = several(model=tiny_llama(tokenizer), max_steps=4)
    for each in (trainer, whole):
        each.train()
    assert logged(trainer, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
    assert set(logged(trainer, "teacher_tail_mass/chat")) == {0.0} and logged(trainer, "teacher_tail_mass/math")


# ---- Objectives that move, states ----


def test_a_resumed_run_goes_on_like_the_one_that_was_not_interrupted(several, tokenizer, tmp_path):
    """TAID's λ follows the rows of math alone; earlier text is trained again with the teacher that it had."""
    taid = {"objective": "taid", "assistant_lambda_schedule": {"kind": "taid", "start": 0.2, "rate": 0.9}}
    settings = {
        "teachers": {"math": taid, "chat": {}},
        **{"sampling": "adaptive", "adaptive_threshold": 0.9, "replay_capacity": 4, "replay_share": "decreasing"},
        **{"lmbda": ..., "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "top_k": 0},
        **{"eval_dataset": named(messages_dataset(2)), "eval_strategy": "steps", "eval_steps": 3, "optim": "sgd"},
    }
    runs = []
    for start in (None, str(tmp_path / "run" / "checkpoint-3")):
        trainer = several(model=tiny_llama(tokenizer), **settings)
        trainer.train(start)
        runs.append(trainer)
    for name in ("loss", "kl", "kl/math", "kl/chat", "assistant_lambda/math"):
        assert logged(runs[1], name) == logged(runs[0], name), name
    moved = logged(runs[0], "assistant_lambda/math")
    assert moved[0] == 0.2 and moved == sorted(moved) and moved[-1] > 0.3
    teachers = runs[0]._parts.teachers
    renamed = Teachers(dict(zip(("math", "code"), teachers.by_name.values(), strict=True)), runs[0].accelerator)
    with pytest.raises(ValueError, match="it is of the teachers math, chat, not math, code"):
        renamed.resume([teachers.state_dict()], 0, 1)


# ---- Kinds ----


def test_offloaded_teachers_take_turns_on_the_device(several, tokenizer, pair, monkeypatch):
    """Never two at once, and never one that is not asked; the numbers are those of two that stay."""
    there, visits, on_device = [], [], HostWeights.on_device

    def counted(self):
        class Visit:
            def __enter__(self):
                there.append(weights_of)
                visits.append(len(there))
                inner.__enter__()

            def __exit__(self, *exception):
                inner.__exit__(*exception)
                there.remove(weights_of)

        weights_of, inner = self, on_device(self)
        return Visit()

    monkeypatch.setattr(HostWeights, "on_device", counted)
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    offloaded = several(
        model=tiny_llama(tokenizer), teachers={name: {"teacher_offload": True} for name in pair}, **split
    )
    offloaded.train()
    assert visits and set(visits) == {1} and len(visits) <= 2 * 3  # a micro-batch of both at most
    staying = several(model=tiny_llama(tokenizer), **split)
    staying.train()
    assert logged(offloaded, "loss") == logged(staying, "loss")


def test_adapters_of_the_students_base_are_teachers_beside_it(several, train, tokenizer, tmp_path):
    from peft import get_peft_model

    base = save_tiny(tmp_path / "base", tiny_llama(tokenizer), tokenizer)
    adapters = {}
    for seed, name in enumerate(("math", "chat")):
        torch.manual_seed(seed)
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA, init_lora_weights=False)
        )
        adapted.save_pretrained(tmp_path / name)
        adapters[name] = adapted
    fields = {name: {"teacher_adapter_path": str(tmp_path / name)} for name in adapters}
    rows = named(messages_dataset(8)).add_column("row", list(range(8)))
    rows = rows.map(lambda row: {"teacher": None if row["row"] == 1 else row["teacher"]})
    runs = []
    for models, teachers in (
        (None, {**fields, "default": {"teacher_adapter_path": "base"}}),
        ({**adapters, "default": AutoModelForCausalLM.from_pretrained(base)}, None),
    ):
        torch.manual_seed(7)
        trainer = train(
            **{"model": str(base), "teacher_model": models, "has_teacher": models is not None, "teachers": teachers},
            **{"train_dataset": rows, "peft_config": LoraConfig(**LORA), "max_steps": 4},
        )
        trainer.train()
        runs.append(trainer)
    assert logged(runs[0], "loss") == pytest.approx(logged(runs[1], "loss"), rel=1e-5)
    assert logged(runs[0], "kl/default")
    runs[0].save_model(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").rglob("adapter_config.json")} == {"adapter_config.json"}
    assert len([*(tmp_path / "saved").rglob("adapter_config.json")]) == 1
    assert set(runs[0].model.peft_config) == {"default", "teacher_math", "teacher_chat"}


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_one_on_another_machine_beside_one_in_memory(several, tokenizer, pair, lmbda):
    """It is asked about its rows alone, each once: what a window expects, the loss finds."""
    settings = {"lmbda": lmbda, "top_k": 1, "max_steps": 3, "gradient_accumulation_steps": 2}
    memory = several(model=tiny_llama(tokenizer), **settings)
    memory.train()
    with hosting(copy.deepcopy(pair["chat"]), tokenizer) as server:
        asked, answer = [], type(server.teacher).__call__

        def counted(self, question):
            asked.append(len(question.lengths))
            return answer(self, question)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(server.teacher), "__call__", counted)
            teachers = {"math": {}, "chat": {"teacher_model_server_url": server.url}}
            models = {"math": pair["math"]}
            trainer = several(model=tiny_llama(tokenizer), teacher_model=models, teachers=teachers, **settings)
            seen = Windows(trainer)
            trainer.train()
    assert logged(trainer, "loss") == pytest.approx(logged(memory, "loss"), rel=1e-5)
    assert logged(trainer, "kl/chat") == pytest.approx(logged(memory, "kl/chat"), rel=1e-5)
    assert sum(asked) == sum(int(batch["teacher"].sum()) for batches, _ in seen.windows for batch in batches)


def test_each_cache_is_filled_with_its_teachers_rows_alone(several, train, tokenizer, pair, tmp_path):
    places = {name: str(save_tiny(tmp_path / f"{name}-model", model, tokenizer)) for name, model in pair.items()}
    teachers = {
        name: {
            "teacher_model_name_or_path": place,
            "teacher_cache": str(tmp_path / f"{name}-cache"),
            "teacher_cache_fill": True,
        }
        for name, place in places.items()
    }
    settings = {"teacher_model": None, "has_teacher": False, "teachers": teachers, "max_steps": 8, "seed": 3}
    filling = train(model=tiny_llama(tokenizer), train_dataset=named(messages_dataset(8)), **settings)
    filling.train()
    held = {name: len(TeacherCache(tmp_path / f"{name}-cache")) for name in pair}
    assert held == {"math": len(MATH_ROWS), "chat": 8 - len(MATH_ROWS)}
    whole = train(model=tiny_llama(tokenizer), train_dataset=named(messages_dataset(8)), **settings)
    whole.train()
    assert set(filling.teacher_models) == {"math", "chat"} and whole.teacher_models == {}
    memory = several(model=tiny_llama(tokenizer), max_steps=8, seed=3)
    memory.train()
    for each in (filling, whole):
        assert logged(each, "loss") == pytest.approx(logged(memory, "loss"), rel=1e-5)
    # One that lacks a row says which, of the whole dataset.
    rows = named(messages_dataset(8)).map(lambda row: {"teacher": "math"})
    reading = {name: {"teacher_cache": fields["teacher_cache"]} for name, fields in teachers.items()}
    with pytest.raises(ValueError, match=r"teachers: math: 3 of 8 rows of the train dataset .* row 1 first"):
        train(**{**settings, "teachers": reading}, train_dataset=rows)


@pytest.mark.parametrize("column", [None, [None, "", *["default"] * 6]], ids=["no column", "rows without a name"])
def test_rows_that_name_nobody_are_in_the_cache_of_default(train, tokenizer, pair, tmp_path, column):
    """Also those of a dataset that is not prepared, which keeps what it says."""
    from amid_trl.training.fill_cache import cache_teacher

    place = str(save_tiny(tmp_path / "teacher", pair["math"], tokenizer))
    cache = {"teacher_cache": str(tmp_path / "cache")}
    filled = {"teacher_model_name_or_path": place, **cache, "teacher_cache_fill": True}
    rows = pretokenised_dataset(tokenizer, 8)
    rows = rows if column is None else rows.add_column("teacher", column)
    settings = {"has_teacher": False, "dataset_kwargs": {"skip_prepare_dataset": True}}

    def build(default, rows=rows):
        return train(
            teacher_model={"chat": pair["chat"]},
            teachers={"default": default, "chat": {}},
            **settings,
            train_dataset=rows,
        )

    build(filled, rows.select(range(4))).train()
    assert len(TeacherCache(tmp_path / "cache")) == 4
    with pytest.raises(ValueError, match=r"teachers: default: 4 of 8 rows of the train dataset .*, row 4 first"):
        build(cache)
    assert "default" in build(filled).teacher_models
    writing = build({"teacher_model_name_or_path": place})
    writing.args.teachers["default"]["teacher_cache_states"] = True
    cache_teacher(writing, str(tmp_path / "cache"), 100, name="default")
    assert len(TeacherCache(tmp_path / "cache")) == 8
    assert "default" not in build(filled).teacher_models
    build(cache).train()


def test_the_command_fills_the_caches_that_training_reads(tokenizer, pair, student, tmp_path, capsys):
    from amid_trl.launch import cache_teacher
    from amid_trl.launch import script as train_script

    for name, model in {"student": student, **pair}.items():
        save_tiny(tmp_path / name, model, tokenizer)
    data = tmp_path / "data"
    data.mkdir()
    named(messages_dataset(8)).to_json(str(data / "train.jsonl"))
    teachers = {
        name: {
            "teacher_model_name_or_path": str(tmp_path / name),
            "teacher_cache": str(tmp_path / f"{name}-cache"),
            "teacher_cache_states": True,
        }
        for name in pair
    }
    flags = ["--model_name_or_path", str(tmp_path / "student"), "--dataset_name", str(data), "--use_cpu"]
    flags += ["--bf16", "False", "--lmbda", "0.0", "--max_steps", "2", "--report_to", "none", "--disable_tqdm", "True"]
    flags += ["--output_dir", str(tmp_path / "run"), "--teachers", json.dumps(teachers), "--save_strategy", "no"]
    train_script.run(flags, cache_teacher.main)
    assert len(TeacherCache(tmp_path / "math-cache")) == len(MATH_ROWS)
    assert len(TeacherCache(tmp_path / "chat-cache")) == 8 - len(MATH_ROWS)
    train_script.run(flags)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "### Rows of the teacher `math`" in card and "### Rows of the teacher `chat`" in card


def test_a_teacher_frozen_among_several_stays_what_it_was(several, pair):
    before = {name: weights(model) for name, model in pair.items()}
    several().train()
    for name, model in pair.items():
        assert not any(parameter.requires_grad for parameter in causal_lm(model).parameters())
        assert all(torch.equal(weight, before[name][key]) for key, weight in weights(model).items())
