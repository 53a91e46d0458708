"""What a teacher does not know or cannot read is said before training, or before an evaluation."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from observe import logged
from server import serving
from states_server import hosting
from tiny import QUESTIONS, messages_dataset, save_tiny, tiny_llama
from transformers import TrainerCallback

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.data.batches import pad_rows
from amid_trl.data.datasets import prepare_dataset
from amid_trl.data.rows import DataSettings
from amid_trl.teacher.cache import CachedTeacher, TeacherCache


CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "lmbda": 0.0,
    "max_new_tokens": 6,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def build(tmp_path, tokenizer):
    """A trainer of a fresh student on six rows, or on those that are given."""

    def new(teacher=None, dataset=None, folder="run", eval_dataset=None, collator=None, callback=None, **settings):
        return AMiDTrainer(
            tiny_llama(tokenizer, seed=0),
            teacher,
            AMiDConfig(str(tmp_path / folder), **{**CONFIG, **settings}),
            data_collator=collator,
            train_dataset=messages_dataset(6) if dataset is None else dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[callback] if callback else None,
        )

    return new


@pytest.fixture
def filled(build, tmp_path, tokenizer, teacher):
    """Settings of a cache that has all rows of `build`, and may be filled."""
    save_tiny(tmp_path / "teacher", teacher, tokenizer)
    settings = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_fill": True}
    settings["teacher_model_name_or_path"] = str(tmp_path / "teacher")
    build(folder="first", max_steps=3, **settings).train()
    assert len(TeacherCache(settings["teacher_cache"])) == 6
    return settings


# ---- Evaluations of rows that a cache has not ----


def prepared(tokenizer, count=8):
    return prepare_dataset(messages_dataset(count), tokenizer, DataSettings(), name="eval")


@pytest.mark.parametrize("how", ["evaluate", "predict"])
def test_a_whole_cache_says_before_an_evaluation_which_rows_it_has_not(build, filled, tokenizer, how):
    trainer = build(eval_dataset=messages_dataset(6), **filled)
    assert isinstance(trainer.teacher, CachedTeacher) and trainer.teacher_model is None
    assert trainer.evaluate()["eval_kl"] > 0
    steps = []
    trainer.prediction_step = lambda *args, **kwargs: steps.append(args)
    with pytest.raises(ValueError, match=r"2 of 8 rows .*, row 6 first: the teacher was not loaded, .*eval_dataset"):
        getattr(trainer, how)(prepared(tokenizer))
    assert not steps


def test_the_way_out_that_it_names_is_one(build, filled, teacher, tokenizer):
    trainer = build(eval_dataset=messages_dataset(8), **filled)
    assert trainer.teacher_model is not None
    want = build(teacher, folder="memory").evaluate(prepared(tokenizer))["eval_kl"]
    assert trainer.evaluate()["eval_kl"] == pytest.approx(want, rel=1e-5)


def test_a_cache_that_is_only_read_says_so_too(build, filled, tokenizer):
    trainer = build(teacher_cache=filled["teacher_cache"])
    with pytest.raises(ValueError, match=r"2 of 8 rows .*, row 6 first: write them with `amid-trl cache-teacher`"):
        trainer.evaluate(prepared(tokenizer))


# ---- Collators of one's own ----


class Shorter:
    """Prepared rows without their last token, padded on the right or on the left."""

    def __init__(self, tokenizer, cut=1, side="right", first_trained=False):
        self.pad, self.cut, self.side, self.first = tokenizer.pad_token_id, cut, side, first_trained

    def __call__(self, rows):
        texts = [(row["input_ids"], row["labels"]) for row in rows]
        if self.first:
            texts = [(ids, [ids[0], *labels[1:]]) for ids, labels in texts]
        ids, labels = (
            [torch.tensor(text[: len(text) - self.cut]) for text in each] for each in zip(*texts, strict=True)
        )
        padded, mask = pad_rows(ids, self.pad, side=self.side)
        return {"input_ids": padded, "attention_mask": mask, "labels": pad_rows(labels, -100, side=self.side)[0]}


def test_the_rows_of_a_collator_of_ones_own_are_not_looked_up_in_the_dataset(build, filled, tokenizer, teacher):
    rows = prepared(tokenizer, 6)
    settings = {"collator": Shorter(tokenizer), "train_sampling_strategy": "sequential"}
    memory = build(teacher, rows, folder="memory", **settings)
    memory.train()
    cut = build(dataset=rows, folder="cut", **settings, **filled)
    assert cut.teacher_model is not None, "the dataset's rows are in the cache, the collator's are not"
    cut.train()
    assert logged(cut, "loss") == pytest.approx(logged(memory, "loss"), rel=1e-5)
    # The cache has what is made of the first four of these rows, and not the last two as they stand there.
    read = build(dataset=prepared(tokenizer, 8), folder="read", teacher_cache=filled["teacher_cache"], **settings)
    read.train()
    assert logged(read, "loss") == pytest.approx(logged(memory, "loss"), rel=1e-5)


@pytest.mark.parametrize("kind", ["memory", "served", "states", "filled"])
def test_the_first_token_of_a_row_is_predicted_by_nothing_wherever_its_padding_is(
    build, tmp_path, tokenizer, teacher, kind
):
    """Left-padded rows whose first token is marked as trained are those that are padded on the right."""
    rows = prepared(tokenizer, 6)
    want = build(teacher, rows, folder="right")
    want.train()
    given = {"dataset": rows, "collator": Shorter(tokenizer, 0, "left", first_trained=True)}
    if kind == "memory":
        trainer = build(teacher, **given)
        trainer.train()
    elif kind == "served":
        with serving(teacher, max_logprobs=360) as server:
            trainer = build(teacher_model_server_url=server.url, teacher_top_k=360, **given)
            trainer.train()
    elif kind == "states":
        with hosting(teacher, tokenizer) as server:
            trainer = build(teacher_model_server_url=server.url, **given)
            trainer.train()
    else:
        trainer = build(teacher, teacher_cache=str(tmp_path / "cache"), teacher_cache_fill=True, **given)
        trainer.train()
    for name in ("loss", "kl", "nll", "grad_norm"):
        assert logged(trainer, name) == pytest.approx(logged(want, name), rel=1e-5), name


# ---- Prompts alone beside a cache ----


@pytest.mark.parametrize("fill", [True, False])
def test_prompts_alone_beside_a_cache_are_not_told_to_be_written(build, filled, fill):
    prompts = Dataset.from_dict({"prompt": [question for question, _ in QUESTIONS]})
    cache = filled if fill else {"teacher_cache": filled["teacher_cache"]}
    words = r"columns 'prompt'\), and a teacher_cache has the teacher's answers to the dataset's own text: give the"
    for settings in (
        {"dataset": prompts},
        {"eval_dataset": prompts},
        {"eval_dataset": prompts, "eval_generate": True},
    ):
        with pytest.raises(ValueError, match=words) as refused:
            build(**settings, **cache)
        assert "lmbda=1.0" not in str(refused.value) and "set eval_generate" not in str(refused.value)


# ---- The teacher's own prompts and a server ----


def hinted(count, long_one):
    """Chats with a hint for the teacher, of which one is long."""
    users = [[{"role": "user", "content": question}] for question, _ in QUESTIONS[:count]]
    answers = [[{"role": "assistant", "content": answer}] for _, answer in QUESTIONS[:count]]
    hints = ["word " * (30 if i == long_one else 1) + question for i, (question, _) in enumerate(QUESTIONS[:count])]
    theirs = [[{"role": "user", "content": hint}] for hint in hints]
    return Dataset.from_dict({"prompt": users, "completion": answers, "teacher_prompt": theirs})


@pytest.mark.parametrize("kind", ["vllm", "states"])
def test_a_prompt_of_the_teachers_own_that_its_server_does_not_read_is_refused_with_its_row(
    build, tokenizer, teacher, kind
):
    reads = 100
    if kind == "vllm":
        opened = serving(teacher, max_logprobs=100, max_model_len=reads + 1)
    else:
        opened = hosting(tiny_llama(tokenizer, seed=1, max_position_embeddings=reads), tokenizer)
    words = rf"row 4 of the train dataset has 1\d\d tokens for the teacher, .* of at most {reads} tokens"
    with opened as server:
        settings = {"teacher_model_server_url": server.url, "max_length": 90}
        with pytest.raises(ValueError, match=words):
            build(dataset=hinted(6, long_one=4), **settings)
        build(dataset=hinted(6, long_one=None), **settings).train()
        with pytest.raises(ValueError, match="row 1 of the eval dataset"):
            build(dataset=hinted(6, long_one=None), eval_dataset=hinted(3, long_one=1), **settings)


@pytest.mark.parametrize("kind", ["vllm", "states"])
def test_text_that_is_written_is_as_long_as_its_server_reads(build, tokenizer, teacher, kind):
    """Where max_length leaves no room beside max_new_tokens a row has both; where nothing is written it has not."""
    if kind == "vllm":
        opened = serving(teacher, max_logprobs=100, max_model_len=41)
    else:
        opened = hosting(tiny_llama(tokenizer, seed=1, max_position_embeddings=40), tokenizer)
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": question}] for question, _ in QUESTIONS[:3]]})
    with opened as server:
        settings = {"teacher_model_server_url": server.url, "max_length": 36, "max_new_tokens": 36}
        with pytest.raises(ValueError, match=r"lower max_length=36 \+ max_new_tokens=36: .* has up to 72 tokens"):
            build(**settings, lmbda=1.0)
        build(**settings)
        with pytest.raises(
            ValueError, match=r"row 0 of the eval dataset has .*: lower max_new_tokens=36 or leave the"
        ):
            build(**settings, eval_dataset=prompts, eval_generate=True)
        build(**{**settings, "max_length": 40, "max_new_tokens": 6}, lmbda=1.0)


def test_what_will_be_written_behind_it_counts(build, teacher):
    rows = hinted(6, long_one=None)
    with serving(teacher, max_logprobs=100, max_model_len=91) as server:
        settings = {"teacher_model_server_url": server.url, "max_length": 90, "dataset": rows, "max_new_tokens": 60}
        build(**settings, lmbda=0.0)
        with pytest.raises(ValueError, match=r"row \d of the train dataset has .* of at most 90 tokens"):
            build(**settings, lmbda=1.0)


# ---- Filling ----


def test_a_checkpoint_has_the_rows_that_it_was_trained_with(build, tmp_path, teacher):
    found = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            folder = Path(tmp_path, "cache")
            found.append(len(TeacherCache(folder)) if (folder / "teacher.json").exists() else 0)

    settings = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_fill": True, "max_steps": 3}
    build(teacher, callback=Look(), save_strategy="steps", save_steps=2, **settings).train()
    assert found == [0, 0, 4], "the third step begins behind the checkpoint of the second"
