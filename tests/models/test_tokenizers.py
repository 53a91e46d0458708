"""Tokens that have another name for the teacher: harmless as long as no text has them."""

import re

import pytest
import torch
from datasets import Dataset
from observe import Windows, completions_of
from tiny import (
    chat_prompt_only_dataset,
    messages_dataset,
    pretokenised_dataset,
    save_tiny,
    tiny_llama,
    tiny_tokenizer,
)

from amid_trl.evaluation import sets
from amid_trl.evaluation.models import open_models
from amid_trl.models.tokenizers import renamed_tokens


@pytest.fixture
def tokenizer():
    """Its padding is its EOS, so that no text has <|endoftext|>, id 0."""
    return tiny_tokenizer(pad_token="<|im_end|>")


@pytest.fixture
def renamed(tmp_path, tokenizer):
    """The path of a teacher with another name for one token; also where that is saved."""

    def save(old: str = "<|endoftext|>", new: str = "<|reserved_0|>") -> str:
        path = save_tiny(tmp_path / "teacher", tiny_llama(tokenizer, seed=1), tokenizer)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (path / name).write_text((path / name).read_text().replace(old, new))
        return str(path)

    return save


def rows_with(token: int, tokenizer) -> Dataset:
    rows = [dict(row) for row in pretokenised_dataset(tokenizer, 6)]
    rows[3]["input_ids"][0] = token  # in the prompt, not trained
    return Dataset.from_list(rows)


def test_a_token_that_no_text_has_may_have_another_name(train, renamed, caplog):
    trainer = train(teacher_model=renamed(), eval_dataset=messages_dataset(2))
    assert "other names for 1 tokens, which no text may have: id 0 ('<|endoftext|>', to the teacher" in caplog.text
    trainer.train()
    assert trainer.evaluate()["eval_kl"] > 0


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset"])
def test_a_text_with_such_a_token_is_refused_with_row_and_names(train, renamed, tokenizer, where):
    message = re.escape(
        "row 3 of a dataset has a token that means another thing to the teacher: id 0 ('<|endoftext|>',"
    )
    with pytest.raises(ValueError, match=message + r" to the teacher '<\|reserved_0\|>'\)"):
        train(teacher_model=renamed(), **{where: rows_with(0, tokenizer)})


def test_a_teacher_that_is_loaded_once_the_data_is_known_refuses_such_a_text_too(train, renamed, tokenizer, tmp_path):
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_fill": True}
    settings = {"has_teacher": False, "teacher_model_name_or_path": renamed(), **cache}
    train(train_dataset=messages_dataset(4), **settings).train()
    with pytest.raises(ValueError, match="row 3 of a dataset has a token that means another thing to the teacher"):
        train(train_dataset=rows_with(0, tokenizer), **settings)


def test_a_streams_row_with_such_a_token_is_refused_when_it_comes(train, renamed, tokenizer):
    rows = rows_with(0, tokenizer).to_iterable_dataset()
    trainer = train(teacher_model=renamed(), train_dataset=rows, max_steps=3)
    with pytest.raises(ValueError, match=r"means another thing to the teacher: id 0"):
        trainer.train()


def test_padding_with_such_a_token_is_no_text(train, renamed, tokenizer):
    tokenizer.pad_token = "<|endoftext|>"
    train(teacher_model=renamed()).train()


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_such_a_token_is_never_written(train, renamed, tokenizer, source):
    path = renamed()
    student = tiny_llama(tokenizer, seed=3)
    with torch.no_grad():  # token 0 would win every step
        student.lm_head.weight[0] = 50 * student.lm_head.weight[1]
    settings = {"lmbda": float(source == "student"), "seq_kd": source == "teacher", "max_steps": 1}
    trainer = train(model=student, teacher_model=path, train_dataset=chat_prompt_only_dataset(8), **settings)
    if source == "teacher":
        with torch.no_grad():
            trainer.teacher_model.lm_head.weight[0] = 50 * trainer.teacher_model.lm_head.weight[1]
    seen = Windows(trainer)
    trainer.train()
    assert not any(0 in ids for ids in completions_of(seen.windows[0]))


def test_an_end_of_text_with_another_name_is_refused_where_a_text_ends(train, renamed, tokenizer):
    """A run that writes text pairs the two ends, as of two tokenizers; another cannot read a row that has one."""
    path = renamed("<|im_end|>", "<|eot|>")
    written = train(teacher_model=path, lmbda=0.5)
    assert "eval_aligned" in written.evaluate(written.train_dataset)
    with pytest.raises(ValueError, match=r"row 0 of a dataset .*'<\|im_end\|>', to the teacher '<\|eot\|>'"):
        train(teacher_model=path)
    endless = pretokenised_dataset(tokenizer, 4).map(lambda row: {name: ids[:-1] for name, ids in row.items()})
    train(teacher_model=path, train_dataset=endless).train()


def test_a_word_that_one_side_lacks_is_refused_and_an_added_one_with_another_id_is_not(tokenizer):
    with pytest.raises(ValueError, match="differ in 20 tokens"):
        renamed_tokens(tokenizer, tiny_tokenizer(vocab_size=340))
    with pytest.raises(ValueError, match=r"differ in 20 tokens .*: id None and 3[45]\d\)"):
        renamed_tokens(tiny_tokenizer(vocab_size=340), tokenizer)
    swapped = tiny_tokenizer()
    swapped.add_tokens(["one", "two"])
    tokenizer.add_tokens(["two", "one"])
    assert renamed_tokens(tokenizer, swapped).names == {360: ("two", "one"), 361: ("one", "two")}


def test_a_token_that_one_side_has_added_is_legal(tokenizer):
    richer = tiny_tokenizer()
    richer.add_tokens(["<|tool|>"])
    assert not renamed_tokens(tokenizer, richer).names and not renamed_tokens(richer, tokenizer).names


def test_an_evaluation_refuses_a_row_with_such_a_token(renamed, tokenizer, tmp_path):
    student = save_tiny(tmp_path / "student", tiny_llama(tokenizer), tokenizer)
    models = open_models(str(student), renamed(), None, "float32", False)
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "Is fire cold?", "reference": "No."}\n{"prompt": "<|endoftext|>", "reference": "No."}\n'
    )
    with pytest.raises(ValueError, match=r"row 2: .*means another thing to the teacher"):
        models.encode(sets.load(str(file)), 8)
