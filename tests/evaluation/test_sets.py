"""The rows that are evaluated: the paper's sets, files, and what cannot be used."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from evaluating import ROWS, SHORT, jsonl, logits_behind, refused, tokens_of
from tiny import CHATML, save_tiny, tiny_llama, tiny_tokenizer

from amid_trl.evaluation import sets as evaluation_sets
from amid_trl.evaluation.evaluate import evaluate


# ---- Named sets ----


def cached(home: Path, source: evaluation_sets.Origin, rows: list[dict]) -> None:
    """The Hub's cache as a download would leave it."""
    repository = home / f"datasets--{source.dataset.replace('/', '--')}"
    file = repository / "snapshots" / "0123abc" / source.file
    file.parent.mkdir(parents=True)
    jsonl(file, rows)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")


def test_the_papers_sets_are_there():
    assert evaluation_sets.names() == ["dolly", "self-inst", "sinst", "uinst", "vicuna"]
    assert {name: evaluation_sets.origin(name).dataset for name in evaluation_sets.names()} == {
        "dolly": "MiniLLM/dolly",
        "self-inst": "MiniLLM/self-inst",
        "sinst": "MiniLLM/sinst",
        "uinst": "MiniLLM/uinst",
        "vicuna": "MiniLLM/Vicuna",
    }


@pytest.mark.parametrize("name", ["dolly", "self-inst", "sinst", "uinst", "vicuna"])
def test_a_named_set_is_read_from_the_hubs_cache(tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    row = {"instruction": "Say it.", "prompt": "### Instruction:\nSay it.\n\n### Response:\n", "output": "It."}
    rows = [row, row | {"output": ["It.", "That."]}]
    cached(tmp_path, evaluation_sets.origin(name), rows * 5001)
    loaded = evaluation_sets.load(name)
    assert len(loaded.examples) == (10000 if name == "uinst" else 10002)
    assert (loaded.name, loaded.version, loaded.prompt_tokens) == (name, 1, 256)
    assert loaded.examples[0] == evaluation_sets.Example(row["prompt"], ["It."])
    assert loaded.examples[1].references == ["It.", "That."]
    assert len(evaluation_sets.load(name, limit=3).examples) == 3


def test_a_long_prompt_of_a_named_set_keeps_its_first_256_tokens(tmp_path, monkeypatch, models):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    rows = [{"prompt": "count " * 200 + "\n", "output": "No."}, {"prompt": "Count.\n", "output": "One."}]
    cached(tmp_path / "hub", evaluation_sets.origin("dolly"), rows)
    settings = replace(SHORT, evaluation_set="dolly", seeds=(10,))
    results = evaluate(models["student"], tmp_path / "out", settings)
    assert results["metrics"]["cut_prompts"] == 1 and results["settings"]["set_version"] == 1
    prompt, answer = tokens_of(rows[0], "No.")
    assert len(prompt) > 256
    logits = logits_behind(models["student"], prompt[:256], answer)
    assert results["rows"][0]["nll"] == pytest.approx(float(F.cross_entropy(logits, torch.tensor(answer))), rel=1e-5)


def test_a_limit_takes_the_first_rows(tmp_path, models, rows_file):
    settings = replace(SHORT, evaluation_set=rows_file, limit=2)
    results = evaluate(models["student"], tmp_path / "out", settings)
    assert [row["prompt"] for row in results["rows"]] == [row["prompt"] for row in ROWS[:2]]


# ---- Bad input ----


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([{"prompt": "a", "completion": "b"}], "line 1: no reference to compare with; needed is a 'reference'"),
        ([{"prompt": "a", "reference": "b"}, {"prompt": "a", "references": []}], "line 2: no reference"),
        ([{"prompt": "a", "references": [""]}], "line 1: no reference"),
        ([{"question": "a", "reference": "b"}], "line 1: the prompt must be text or a list of messages; got None"),
        ([{"prompt": [{"role": "user"}], "reference": "b"}], "line 1: the prompt must be"),
        ([{"prompt": "one " * 600, "reference": "b"}], "row 1: a prompt of"),
        ([{"prompt": "one " * 300, "reference": "b"}], "max_new_tokens=256 are more than the 512 positions"),
        ([["a", "b"]], "line 1: a JSON object is needed"),
    ],
)
def test_a_set_that_cannot_be_used_is_refused_with_its_row(tmp_path, models, capsys, rows, message):
    data = jsonl(tmp_path / "rows.jsonl", rows)
    error = refused(capsys, models["student"], "--evaluation-set", data, "--output-dir", str(tmp_path / "out"))
    assert message in error and "rows.jsonl" in error
    assert not (tmp_path / "out").exists()


def test_a_line_that_is_not_json_is_named(tmp_path, models, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "reference": "b"}\n\n{"prompt"\n')
    data = str(tmp_path / "rows.jsonl")
    error = refused(capsys, models["student"], "--evaluation-set", data, "--output-dir", str(tmp_path / "out"))
    assert "line 3: not JSON in UTF-8" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "nothing to evaluate"),
        (("--lm-eval", "arc_easy", "--teacher", "x"), "a teacher has no effect without an evaluation_set"),
        (("--evaluation-set", "doly"), "doly is neither a file nor one of dolly, self-inst, sinst, uinst, vicuna"),
        (("--evaluation-set", "dolly"), "MiniLLM/dolly"),
        (("--evaluation-set", "x", "--seeds", "1", "1"), "seeds must be different numbers"),
        (("--evaluation-set", "x", "--temperature", "0"), "temperature must be positive and finite; got 0.0"),
        (("--evaluation-set", "x", "--top-p", "1.5"), "top_p must be in (0, 1]; got 1.5"),
        (("--evaluation-set", "x", "--batch-size", "0"), "batch_size must be at least 1; got 0"),
        (("--evaluation-set", "x", "--max-new-tokens", "0"), "max_new_tokens must be at least 1"),
        (("--evaluation-set", "x", "--limit", "0"), "limit must be at least 1"),
        (("--evaluation-set", "x", "--no-repeat-ngram-size", "-1"), "no_repeat_ngram_size must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path, monkeypatch, models, capsys, flags, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert message in refused(capsys, models["student"], "--output-dir", str(tmp_path / "out"), *flags)
    assert not (tmp_path / "out").exists()


def test_a_file_in_another_encoding_is_named(tmp_path, models, capsys):
    (tmp_path / "rows.jsonl").write_bytes('{"prompt": "a", "reference": "b"}\n{"prompt": "é"}'.encode("latin-1"))
    data = str(tmp_path / "rows.jsonl")
    error = refused(capsys, models["student"], "--evaluation-set", data, "--output-dir", str(tmp_path / "out"))
    assert "rows.jsonl, line 2: not JSON in UTF-8" in error


def test_a_row_that_the_chat_template_refuses_is_named(tmp_path, capsys):
    rule = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    tokenizer = tiny_tokenizer(chat_template=rule + CHATML)
    student = save_tiny(tmp_path / "student", tiny_llama(tokenizer), tokenizer)
    rows = [ROWS[5], {"prompt": [{"role": "tool", "content": "3"}], "reference": "4"}]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    error = refused(capsys, str(student), "--evaluation-set", data, "--output-dir", str(tmp_path / "out"))
    assert "rows.jsonl, row 2: " in error and "no tools here" in error


def test_messages_need_a_chat_template(tmp_path, capsys):
    tokenizer = tiny_tokenizer(chat_template=None)
    student = save_tiny(tmp_path / "student", tiny_llama(tokenizer), tokenizer)
    data = jsonl(tmp_path / "rows.jsonl", [ROWS[5]])
    error = refused(capsys, str(student), "--evaluation-set", data, "--output-dir", str(tmp_path / "out"))
    assert "chat template" in error or "chat_template" in error


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path, models, rows_file, capsys):
    tokenizer = tiny_tokenizer(vocab_size=330)
    teacher = save_tiny(tmp_path / "teacher", tiny_llama(tokenizer), tokenizer)
    flags = ("--evaluation-set", rows_file, "--teacher", str(teacher), "--output-dir", str(tmp_path / "out"))
    assert "need the same tokenizer" in refused(capsys, models["student"], *flags)
