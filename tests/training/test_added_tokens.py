"""Tokens that have been added behind a model's rows, as Gemma 3's <image_soft_token>: no text may have them."""

import pytest
import torch
from datasets import Dataset
from observe import logged
from small_tokenizers import in_order, special_first
from tiny import (
    messages_dataset,
    prompt_completion_dataset,
    prompt_only_dataset,
    save_tiny,
    text_dataset,
    tiny_llama,
    tiny_tokenizer,
)

from amid_trl.choosing.grid import Grid
from amid_trl.choosing.tokens import trainer_landscape
from amid_trl.evaluation.evaluate import evaluate
from amid_trl.evaluation.settings import EvaluationSettings
from amid_trl.training.fill_cache import cache_teacher


IMAGE = "<image_soft_token>"
UNKNOWN = rf"has the id 360 \('{IMAGE}'\), but the student knows the ids 0 to 359 alone"


def with_image(tokenizer):
    """Of special tokens, as Gemma 3's is."""
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids(IMAGE) == len(tokenizer) - 1
    return tokenizer


@pytest.fixture
def tokenizer():
    """Of 361 tokens; both models of the pair have their rows for 360 of them at least."""
    return with_image(tiny_tokenizer())


@pytest.fixture
def student():
    return tiny_llama(tiny_tokenizer(), seed=0)


@pytest.fixture
def teacher():
    """Of a multimodal model, which has a row for it, and some more."""
    return tiny_llama(tiny_tokenizer(), seed=1, vocab_size=368)


def naming_image(rows: int = 4) -> Dataset:
    return Dataset.from_list([{"prompt": "Is it wet?", "completion": f" Yes{IMAGE * (i == 2)}."} for i in range(rows)])


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_texts_without_it_are_trained_as_if_it_had_not_been_added(train, lmbda):
    losses = []
    for used in (tiny_tokenizer(), with_image(tiny_tokenizer())):
        given = {"model": tiny_llama(tiny_tokenizer(), seed=0), "teacher_model": tiny_llama(tiny_tokenizer(), seed=1)}
        trainer = train(**given, processing_class=used, lmbda=lmbda)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("rows", [360, 361, 368])
def test_a_teacher_with_more_rows_is_compared_on_the_students(train, rows):
    model = tiny_llama(tiny_tokenizer(), seed=1, vocab_size=rows)
    trainer = train(teacher_model=model, max_steps=1, eval_dataset=messages_dataset(2))
    trainer.train()
    assert trainer.vocabulary == 360
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


@pytest.mark.parametrize("dataset", ["train", "eval"])
def test_a_row_with_it_is_named_before_training(train, dataset):
    with pytest.raises(ValueError, match=rf"row 2 of the {dataset} dataset {UNKNOWN}"):
        train(**{f"{dataset}_dataset": naming_image()})


def test_a_stream_is_told_when_the_row_comes(train):
    trainer = train(train_dataset=naming_image().to_iterable_dataset())
    with pytest.raises(ValueError, match=f"a text of this run {UNKNOWN}"):
        trainer.train()


def test_so_are_rows_of_tokens(train):
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7], [5, 360, 7])])
    with pytest.raises(ValueError, match=f"row 1 of the train dataset {UNKNOWN}"):
        train(train_dataset=rows)


def test_plain_text_with_it_is_named(train):
    texts = Dataset.from_list(4 * [{"text": f"An owl reads {IMAGE} and sleeps."}])
    with pytest.raises(ValueError, match=f"a document of the plain text {UNKNOWN}"):
        train(pretrain_dataset=texts, max_length=64)


@pytest.mark.parametrize("role", ["pad_token", "eos_token"])
def test_one_that_ends_or_fills_texts_needs_a_row(train, role, tokenizer):
    setattr(tokenizer, role, IMAGE)
    with pytest.raises(ValueError, match=r"token ids up to 360 but the student's vocab_size is 360; resize"):
        train(teacher_model=tiny_llama(tokenizer, seed=1))


def test_ordinary_tokens_behind_the_rows_are_refused(train):
    small = tiny_llama(tiny_tokenizer(), seed=0, vocab_size=350)
    with pytest.raises(ValueError, match=r"token ids up to 360 but the student's vocab_size is 350; resize"):
        train(model=small)


def test_a_landscape_and_an_evaluation_are_of_the_same_tokens(train, student, teacher, tokenizer, tmp_path):
    found = trainer_landscape(train(), Grid(alphas=(0.0,), lambdas=(0.5,)), rows=2)
    assert found.tokens > 0
    for name, model in (("student", student), ("teacher", teacher)):
        save_tiny(tmp_path / name, model, tokenizer)
    file = tmp_path / "set.jsonl"
    settings = EvaluationSettings(evaluation_set=str(file), seeds=(10,), max_new_tokens=4, batch_size=2)
    paths = [str(tmp_path / name) for name in ("student", "out", "teacher")]
    file.write_text('{"prompt": "Is water wet?", "reference": " Yes."}\n')
    assert evaluate(paths[0], paths[1], settings, teacher=paths[2])["metrics"]["kl_pq"] > 0
    file.write_text(f'{{"prompt": "Is {IMAGE} wet?", "reference": " Yes."}}\n')
    with pytest.raises(ValueError, match=r"row 1: its text has the id 360 .*but the model knows the ids 0 to 359"):
        evaluate(paths[0], str(tmp_path / "other"), settings, teacher=paths[2])


@pytest.mark.parametrize("states", [True, False])
def test_a_cache_of_it_is_filled_and_read(train, tmp_path, states):
    direct = train(max_steps=1)
    direct.args.teacher_cache_states = states
    folder = str(tmp_path / "cache")
    cache_teacher(direct, folder, 360, "float32")
    direct.train()
    given = {"model": tiny_llama(tiny_tokenizer(), seed=0), "has_teacher": False, "teacher_cache": folder}
    trainer = train(**given, **({} if states else {"teacher_top_k": 360}), max_steps=1)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(logged(direct, "loss"), rel=1e-4)


# ---- With another tokenizer ----


@pytest.fixture
def pair(tmp_path):
    """Both have such a token: of 480 and 483 others."""
    ours, theirs = in_order(), special_first()
    theirs.chat_template += "{#- its own -#}"
    model, teacher = tiny_llama(ours, seed=0), tiny_llama(theirs, seed=1)
    save_tiny(tmp_path / "plain", teacher, theirs)
    save_tiny(tmp_path / "added", teacher, with_image(special_first()))
    return {"model": model, "processing_class": with_image(in_order())}


def test_a_pair_of_two_tokenizers_is_trained_as_if_it_had_not_been_added(train, pair, tmp_path):
    losses = []
    for name, used in (("plain", in_order()), ("added", pair["processing_class"])):
        model = tiny_llama(in_order(), seed=0)
        rows = text_dataset(4)
        trainer = train(
            model=model, processing_class=used, teacher_model=str(tmp_path / name), train_dataset=rows, max_steps=1
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
        assert [len(side) for side in (trainer.teacher.outcomes.student, trainer.teacher.outcomes.teacher)] == [
            483
        ] * 2
    assert losses[0] == losses[1]


def test_the_student_may_write_the_text(train, pair, tmp_path):
    trainer = train(**pair, teacher_model=str(tmp_path / "added"), train_dataset=prompt_only_dataset(4), lmbda=1.0)
    trainer.train()
    assert logged(trainer, "aligned")[0] > 0


def test_a_row_with_it_is_named_on_either_side(train, pair, tmp_path):
    given = {**pair, "teacher_model": str(tmp_path / "added")}
    with pytest.raises(ValueError, match=r"row 2 of the train dataset has the id 483 .*the student knows the ids"):
        train(**given, train_dataset=naming_image())
    rows = prompt_completion_dataset(4).add_column("teacher_prompt", [f"Is {IMAGE} wet?"] * 4)
    with pytest.raises(ValueError, match=r"row 0 of the train dataset has the id 483 .*the teacher knows the ids"):
        train(**given, train_dataset=rows)
    trainer = train(**given, train_dataset=rows.to_iterable_dataset())
    with pytest.raises(ValueError, match=r"a text of this run has the id 483 .*the teacher knows the ids"):
        trainer.train()


def test_its_name_is_text_to_a_tokenizer_that_lacks_it(train, pair, tmp_path):
    rows = Dataset.from_list(4 * [{"prompt": "Is it wet?", "completion": f" Yes{IMAGE}."}])
    given = {"model": pair["model"], "processing_class": in_order(), "teacher_model": str(tmp_path / "added")}
    trainer = train(**given, train_dataset=rows, max_steps=1)
    trainer.train()
    assert logged(trainer, "aligned")[0] > 0
