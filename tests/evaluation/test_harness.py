"""Tasks of lm-eval-harness behind `amid-trl evaluate --lm-eval`."""

import sys

import pytest
import torch
import torch.nn.functional as F
from evaluating import jsonl, logits_behind, refused
from tiny import QUESTIONS, tiny_tokenizer

from amid_trl import cli
from amid_trl.evaluation.evaluate import evaluate
from amid_trl.evaluation.harness import tokenizer_of_tasks
from amid_trl.evaluation.settings import EvaluationSettings


def test_without_lm_eval_the_error_names_the_extra(tmp_path, models, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert (
        cli.main(["evaluate", models["student"], "--output-dir", str(tmp_path / "out"), "--lm-eval", "arc_easy"]) == 2
    )
    assert "pip install 'amid-trl[eval-harness]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def with_bos(tokenizer):
    """Which has a BOS token, and puts it before no text."""
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


def asked(**options) -> EvaluationSettings:
    return EvaluationSettings(lm_eval=("arc_easy",), **options)


def test_bos_stands_before_a_text_where_it_is_asked_for():
    tokenizer = with_bos(tiny_tokenizer())
    plain = tokenizer("owl")["input_ids"]
    for left in (None, False):
        assert tokenizer_of_tasks(tokenizer, asked(lm_eval_add_bos=left)) is tokenizer
    own = tokenizer_of_tasks(tokenizer, asked(lm_eval_add_bos=True))
    assert own("owl")["input_ids"] == [tokenizer.bos_token_id, *plain]
    assert own("owl", add_special_tokens=False)["input_ids"] == tokenizer("owl")["input_ids"] == plain
    assert tokenizer_of_tasks(own, asked(lm_eval_add_bos=True)) is own, "which adds one already"


def test_a_bos_or_a_template_that_a_tokenizer_has_not_is_refused(tmp_path, models):
    with pytest.raises(ValueError, match="lm_eval_add_bos=True, but the tokenizer puts no BOS before a text: None"):
        tokenizer_of_tasks(tiny_tokenizer(), asked(lm_eval_add_bos=True))
    with pytest.raises(ValueError, match="lm_eval_chat_template=True, but the tokenizer has no chat template"):
        tokenizer_of_tasks(tiny_tokenizer(chat_template=None), asked(lm_eval_chat_template=True))


@pytest.mark.parametrize("flags", [["--lm-eval-chat-template"], ["--lm-eval-add-bos"], ["--no-lm-eval-add-bos"]])
def test_options_of_lm_eval_without_tasks_are_refused(tmp_path, flags, capsys):
    error = refused(capsys, "m", "--output-dir", str(tmp_path), "--evaluation-set", "dolly", *flags)
    assert "has no effect without tasks in lm_eval" in error


def test_what_is_chosen_is_kept_beside_the_results():
    before = EvaluationSettings(lm_eval=("arc_easy",)).record()
    assert not [name for name in before if name.startswith("lm_eval_")], "as in folders from before there was a choice"
    assert asked(lm_eval_add_bos=False).record() == {**before, "lm_eval_add_bos": False}
    assert asked(lm_eval_chat_template=True).record() == {**before, "lm_eval_chat_template": True}


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
@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({}, "", " "),
        ({"lm_eval_add_bos": True}, "<|endoftext|>", " "),
        ({"lm_eval_chat_template": True}, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        (
            {"lm_eval_chat_template": True, "lm_eval_add_bos": True},
            "<|endoftext|><|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
    ids=["as it is", "BOS", "chat", "both"],
)
def test_a_task_of_lm_eval_is_run_on_the_model(tmp_path, models, options, before, after):
    pytest.importorskip("lm_eval")
    rows = [
        {"question": question, "choices": [answer, QUESTIONS[i - 1][1]], "label": i % 2}
        for i, (question, answer) in enumerate(QUESTIONS)
    ]
    (tmp_path / "answers.yaml").write_text(TASK.replace("FILE", jsonl(tmp_path / "answers.jsonl", rows)))
    settings = EvaluationSettings(lm_eval=(str(tmp_path / "answers.yaml"),), batch_size=3, **options)
    results = evaluate(models["student"], tmp_path / "out", settings, tokenizer=with_bos(tiny_tokenizer()))
    correct = 0
    for row in rows:
        likelihoods = []
        for choice in row["choices"]:
            tokenizer = tiny_tokenizer()
            text = f"{before}{row['question']}{after}"
            prompt = tokenizer(text.rstrip())["input_ids"]  # the harness counts blanks before the answer as its own
            answer = tokenizer(text + choice)["input_ids"][len(prompt) :]
            logits = logits_behind(models["student"], prompt, answer)
            likelihoods.append(-float(F.cross_entropy(logits, torch.tensor(answer), reduction="sum")))
        correct += likelihoods.index(max(likelihoods)) == row["label"]
    assert options or 0 < correct < len(rows)
    assert results["metrics"]["answers/acc"] == correct / len(rows)
    assert {name.split("/")[1].removesuffix("_stderr") for name in results["metrics"]} == {"acc"}
    assert "| answers/acc |" in (tmp_path / "out" / "results.md").read_text()


def test_an_unknown_task_is_named_before_anything_is_measured(tmp_path, models, rows_file, capsys):
    pytest.importorskip("lm_eval")
    flags = ("--evaluation-set", rows_file, "--lm-eval", "arc_easy,arc_esay", "--output-dir", str(tmp_path / "out"))
    error = refused(capsys, models["student"], *flags)
    assert "no task arc_esay," in error
    assert not (tmp_path / "out").exists()
