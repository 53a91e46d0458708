"""Tasks of lm-eval-harness behind `amid-trl evaluate --lm-eval`."""

import sys

import pytest
import torch
import torch.nn.functional as F
from evaluating import jsonl, logits_behind, refused
from tiny import QUESTIONS, tiny_tokenizer

from amid_trl import cli
from amid_trl.evaluation.evaluate import evaluate
from amid_trl.evaluation.settings import EvaluationSettings


def test_without_lm_eval_the_error_names_the_extra(tmp_path, models, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert (
        cli.main(["evaluate", models["student"], "--output-dir", str(tmp_path / "out"), "--lm-eval", "arc_easy"]) == 2
    )
    assert "pip install 'amid-trl[eval-harness]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# A task of its own: which of the answers is likelier behind the question.
TASK = """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
"""


@pytest.mark.filterwarnings("default")  # lm-eval-harness's own
def test_a_task_of_lm_eval_is_run_on_the_model(tmp_path, models):
    pytest.importorskip("lm_eval")
    rows = [
        {"question": question, "choices": [answer, QUESTIONS[i - 1][1]], "label": i % 2}
        for i, (question, answer) in enumerate(QUESTIONS)
    ]
    (tmp_path / "answers.yaml").write_text(TASK.replace("FILE", jsonl(tmp_path / "answers.jsonl", rows)))
    settings = EvaluationSettings(lm_eval=(str(tmp_path / "answers.yaml"),), batch_size=3)
    results = evaluate(models["student"], tmp_path / "out", settings)
    correct = 0
    for row in rows:
        likelihoods = []
        for choice in row["choices"]:
            tokenizer = tiny_tokenizer()
            prompt = tokenizer(row["question"])["input_ids"]
            answer = tokenizer(f"{row['question']} {choice}")["input_ids"][len(prompt) :]
            logits = logits_behind(models["student"], prompt, answer)
            likelihoods.append(-float(F.cross_entropy(logits, torch.tensor(answer), reduction="sum")))
        correct += likelihoods.index(max(likelihoods)) == row["label"]
    assert 0 < correct < len(rows)
    assert results["metrics"]["answers/acc"] == correct / len(rows)
    assert {name.split("/")[1].removesuffix("_stderr") for name in results["metrics"]} == {"acc"}
    assert "| answers/acc |" in (tmp_path / "out" / "results.md").read_text()


def test_an_unknown_task_is_named_before_anything_is_measured(tmp_path, models, rows_file, capsys):
    pytest.importorskip("lm_eval")
    flags = ("--evaluation-set", rows_file, "--lm-eval", "arc_easy,arc_esay", "--output-dir", str(tmp_path / "out"))
    error = refused(capsys, models["student"], *flags)
    assert "no task arc_esay," in error
    assert not (tmp_path / "out").exists()
