"""`amid-trl evaluate` on tiny models, as a function and as a process: the figures are computed again from the text."""

import fcntl
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from tiny import QUESTIONS, save_tiny, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from amid_trl import cli, evaluation_sets
from amid_trl.evaluate import evaluate
from amid_trl.evaluation_models import EvaluationModels
from amid_trl.evaluation_results import EvaluationSettings, table


ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "LOCAL_RANK"))}
# 7 rows in batches of 3, so that the last batch is not full; of several references the first is not always the best.
ROWS = [
    *({"prompt": f"{question}\n", "reference": answer} for question, answer in QUESTIONS[:4]),
    {"prompt": "Who wrote this story?\n", "references": ["Nobody knows.", "e e the the the"]},
    {"prompt": [{"role": "user", "content": "When does it sleep?"}], "reference": "Until noon."},
    {"prompt": "One, two, three, four, five: count on.\n", "references": ["Six, seven."]},
]
SHORT = EvaluationSettings("unused", seeds=(10, 20), batch_size=3, max_new_tokens=24)


def jsonl(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def taught(model, steps: int):
    """The model after some steps on the rows, so that it writes words of them, and an end."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        for row in ROWS:
            prompt, answer = tokens_of(row, references_of(row)[0])
            optimiser.zero_grad()
            model(
                torch.tensor([prompt + answer]), labels=torch.tensor([[-100] * len(prompt) + answer])
            ).loss.backward()
            optimiser.step()
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer()
    student = taught(tiny_llama(tokenizer, seed=0), steps=1)
    teacher = taught(tiny_llama(tokenizer, seed=1, hidden_size=48, intermediate_size=96), steps=3)
    return {
        "student": str(save_tiny(folder / "student", student, tokenizer)),
        "teacher": str(save_tiny(folder / "teacher", teacher, tokenizer)),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, models, data) -> tuple[dict, Path]:
    """One evaluation with a teacher, and its folder."""
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    evaluate(models["student"], folder, replace(SHORT, evaluation_set=data), teacher=models["teacher"])
    return json.loads((folder / "results.json").read_text()), folder


def tokens_of(row: dict, reference: str) -> tuple[list[int], list[int]]:
    """Prompt, and reference with EOS."""
    tokenizer = tiny_tokenizer()
    prompt = row["prompt"]
    if isinstance(prompt, list):
        prompt = f"<|im_start|>user\n{prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(prompt)["input_ids"], tokenizer(reference + "<|im_end|>")["input_ids"]


def references_of(row: dict) -> list[str]:
    return [row["reference"]] if "reference" in row else row["references"]


def logits_behind(path: str, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The logits that predict the answer, in float64."""
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["evaluate", *arguments]) == 2
    return capsys.readouterr().err


# ---- The figures ----


def test_rouge_l_is_that_of_the_stored_completions(evaluated):
    results, _ = evaluated
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    of_seeds = []
    for seed in (10, 20):
        texts = [each["text"] for each in results["completions"] if each["seed"] == seed]
        best = [
            max(scorer.score(reference, text)["rougeL"].fmeasure for reference in references_of(row))
            for text, row in zip(texts, ROWS, strict=True)
        ]
        of_seeds.append(100 * sum(best) / len(best))
        assert results["per_seed"][str(seed)]["rougeL"] == pytest.approx(of_seeds[-1])
    assert of_seeds[0] != of_seeds[1]
    assert results["metrics"]["rougeL"] == pytest.approx(sum(of_seeds) / 2)
    assert results["metrics"]["rougeL_std"] == pytest.approx(abs(of_seeds[0] - of_seeds[1]) / 2)


def test_lengths_are_means_over_the_completions_of_a_seed(evaluated):
    results, folder = evaluated
    kept = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    for seed, figures in results["per_seed"].items():
        ids = [each["ids"] for line in kept if line["seed"] == int(seed) for each in line["completions"]]
        assert figures["mean_length"] == pytest.approx(sum(map(len, ids)) / len(ROWS))
        clipped = [row[-1] != tiny_tokenizer().eos_token_id for row in ids]
        assert figures["clipped_ratio"] == pytest.approx(sum(clipped) / len(ROWS)) and 0 < sum(clipped) < len(ROWS)
    assert results["metrics"]["mean_length"] == pytest.approx(
        statistics.fmean(figures["mean_length"] for figures in results["per_seed"].values())
    )


def test_distinct_n_counts_over_all_completions_of_a_seed(tmp_path, models, data):
    settings = replace(SHORT, evaluation_set=data, seeds=(10,), temperature=0.5)
    results = evaluate(models["teacher"], tmp_path / "out", settings)
    words = [each["text"].split() for each in results["completions"]]
    pairs = [pair for text in words for pair in pairwise(text)]
    first = len({word for text in words for word in text}) / sum(map(len, words))
    second = len(set(pairs)) / len(pairs)
    assert results["metrics"]["distinct_1"] == pytest.approx(first) and first < 0.95
    assert results["metrics"]["distinct_2"] == pytest.approx(second) and second != first


def test_the_teachers_perplexity_is_that_of_the_students_tokens(evaluated, models):
    results, folder = evaluated
    perplexities = []
    for seed in (10, 20):
        nats = tokens = 0
        for line in map(json.loads, (folder / "completions.jsonl").read_text().splitlines()):
            for each in line["completions"] if line["seed"] == seed else []:
                prompt, _ = tokens_of(ROWS[each["row"]], "")
                logits = logits_behind(models["teacher"], prompt, each["ids"])
                nats += float(F.cross_entropy(logits, torch.tensor(each["ids"]), reduction="sum"))
                tokens += len(each["ids"])
        perplexities.append(math.exp(nats / tokens))
        assert results["per_seed"][str(seed)]["teacher_perplexity"] == pytest.approx(perplexities[-1], rel=1e-5)
    assert results["metrics"]["teacher_perplexity"] == pytest.approx(sum(perplexities) / 2, rel=1e-5)


def test_the_first_reference_is_scored_behind_its_prompt_to_its_eos(evaluated, models):
    results, _ = evaluated
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    for row, kept in zip(ROWS, results["rows"], strict=True):
        prompt, answer = tokens_of(row, references_of(row)[0])
        log_q, log_p = (logits_behind(models[name], prompt, answer).log_softmax(-1) for name in ("student", "teacher"))
        figures = [
            F.nll_loss(log_q, torch.tensor(answer), reduction="sum"),
            F.kl_div(log_q, log_p, log_target=True, reduction="sum"),
            (log_q.argmax(-1) == log_p.argmax(-1)).sum(),
        ]
        assert kept["tokens"] == len(answer) and kept["nll"] == pytest.approx(
            float(figures[0]) / len(answer), rel=1e-5
        )
        sums += torch.stack([figure.double() for figure in figures])
        tokens += len(answer)
    want = dict(zip(("nll", "kl_pq", "top1_agreement"), (sums / tokens).tolist(), strict=True))
    assert 0 < want["top1_agreement"] < 1
    assert {name: results["metrics"][name] for name in want} == pytest.approx(want, rel=1e-5)
    assert results["metrics"]["reference_tokens"] == tokens


def test_without_a_teacher_there_is_the_nll_alone(tmp_path, models, data, evaluated):
    settings = replace(SHORT, evaluation_set=data, seeds=(10,))
    metrics = evaluate(models["student"], tmp_path / "out", settings)["metrics"]
    assert metrics["nll"] == pytest.approx(evaluated[0]["metrics"]["nll"])
    assert metrics["rougeL_std"] == 0
    assert not {"kl_pq", "top1_agreement", "teacher_perplexity"} & set(metrics)


def test_a_reference_is_scored_up_to_max_new_tokens(tmp_path, models, data):
    settings = replace(SHORT, evaluation_set=data, seeds=(10,), max_new_tokens=3)
    results = evaluate(models["student"], tmp_path / "out", settings)
    assert [row["tokens"] for row in results["rows"]] == [3] * len(ROWS)


def test_an_adapter_is_evaluated_with_its_base(tmp_path, models, data):
    base = AutoModelForCausalLM.from_pretrained(models["student"])
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.full_like(parameter, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    settings = replace(SHORT, evaluation_set=data, seeds=(10,))
    adapted = evaluate(str(tmp_path / "adapter"), tmp_path / "adapted", settings)
    in_memory = evaluate(model, tmp_path / "memory", settings, tokenizer=tiny_tokenizer())
    plain = evaluate(models["student"], tmp_path / "plain", settings)
    assert adapted["metrics"] == pytest.approx(in_memory["metrics"], rel=1e-5)
    assert adapted["metrics"]["nll"] != pytest.approx(plain["metrics"]["nll"], rel=1e-3)


def test_a_padded_vocabulary_is_neither_scored_nor_written(tmp_path, models, data):
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer, seed=0, vocab_size=len(tokenizer) + 300)
    settings = replace(SHORT, evaluation_set=data, seeds=(10,))
    results = evaluate(model, tmp_path / "out", settings, tokenizer=tokenizer)
    kept = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    assert max(token for line in kept for each in line["completions"] for token in each["ids"]) < len(tokenizer)
    prompt, answer = tokens_of(ROWS[0], references_of(ROWS[0])[0])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)].double()
    assert results["rows"][0]["nll"] == pytest.approx(float(F.cross_entropy(logits, torch.tensor(answer))), rel=1e-5)


# ---- Sampling ----


def test_a_seeds_completions_depend_on_no_other_seed_and_on_no_random_state(tmp_path, models, data, evaluated):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    alone = evaluate(models["student"], tmp_path / "out", replace(SHORT, evaluation_set=data, seeds=(20,)))
    assert torch.equal(torch.get_rng_state(), state)
    texts = {seed: [each["text"] for each in evaluated[0]["completions"] if each["seed"] == seed] for seed in (10, 20)}
    assert [each["text"] for each in alone["completions"]] == texts[20] != texts[10]


def test_the_whole_distribution_is_sampled_from(models, data):
    tokenizer = tiny_tokenizer()
    student = AutoModelForCausalLM.from_pretrained(models["student"])
    student.generation_config.top_k = 1  # ships with the model, and is greedy
    config = EvaluationModels(student, None, tokenizer).sampling(EvaluationSettings("dolly"))
    assert (config.temperature, config.top_p, config.top_k, config.no_repeat_ngram_size) == (1.0, 1.0, 0, 6)
    assert (config.do_sample, config.max_new_tokens) == (True, 256)


def test_batches_of_the_same_prompts_draw_other_answers(tmp_path, models):
    data = jsonl(tmp_path / "rows.jsonl", [ROWS[0]] * 4)
    settings = replace(SHORT, evaluation_set=data, seeds=(10,), batch_size=2)
    first, second, third, fourth = evaluate(models["student"], tmp_path / "out", settings)["completions"]
    assert [first["text"], second["text"]] != [third["text"], fourth["text"]]


def test_the_dtype_is_that_of_the_flag(tmp_path, models, data):
    flags = ("--evaluation-set", data, "--limit", "1", "--seeds", "1", "--max-new-tokens", "2", "--dtype", "bfloat16")
    assert cli.main(["evaluate", models["student"], "--output-dir", str(tmp_path / "out"), *flags]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(("size", "repeats"), [(0, True), (1, False)])
def test_no_ngram_is_written_twice_unless_that_rule_is_off(tmp_path, models, data, size, repeats):
    settings = replace(SHORT, evaluation_set=data, seeds=(10,), temperature=2.0, no_repeat_ngram_size=size)
    evaluate(models["student"], tmp_path / "out", settings)
    kept = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    written = [each["ids"] for line in kept for each in line["completions"]]
    assert any(len(set(ids)) < len(ids) for ids in written) == repeats


# ---- As a process: what is written, and going on ----


def test_a_killed_run_goes_on_and_ends_in_the_results_of_one_that_was_not(tmp_path, models, data, capsys):
    killed, file = tmp_path / "killed", tmp_path / "killed" / "completions.jsonl"
    command = [
        *("evaluate", models["student"], "--teacher", models["teacher"], "--evaluation-set", data),
        *("--output-dir", str(killed), "--batch-size", "1", "--max-new-tokens", "24"),
        *("--seeds", *map(str, range(20))),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "amid_trl", *command], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= 20) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = file.read_bytes()
    whole_lines = written[: written.rindex(b"\n") + 1]
    assert 20 <= whole_lines.count(b"\n") < 20 * len(ROWS) and not (killed / "results.json").exists()
    file.write_bytes(whole_lines + b'{"seed": 19, "batch": 6, "completio')

    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert "| rougeL |" in printed.out and f"completions: 100%|██████████| {20 * len(ROWS)}/" in printed.err
    assert file.read_bytes().startswith(whole_lines)
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 20 * len(ROWS)

    settings = replace(SHORT, evaluation_set=data, batch_size=1, seeds=tuple(range(20)))
    evaluate(models["student"], tmp_path / "whole", settings, teacher=models["teacher"])
    resumed, whole = (json.loads((folder / "results.json").read_text()) for folder in (killed, tmp_path / "whole"))
    del resumed["date"], whole["date"]
    assert resumed == whole


def test_the_results_say_what_they_are_of(evaluated, models, data):
    results, folder = evaluated
    assert set(results) == {
        "settings", "versions", "date", "metrics", "per_seed", "rows", "completions",
    }  # fmt: skip
    settings = results["settings"]
    assert settings["model"] == models["student"] and settings["teacher"] == models["teacher"]
    assert settings["evaluation_set"] == data and settings["seeds"] == [10, 20]
    assert results["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(results["completions"]) == 2 * len(ROWS)
    table = (folder / "results.md").read_text()
    assert "| metric | value | seed 10 | seed 20 |" in table
    assert f"| rougeL | {results['metrics']['rougeL']:.4g} | {results['per_seed']['10']['rougeL']:.4g} |" in table


def test_a_finished_folder_is_not_measured_again(evaluated, models, data, caplog):
    results, folder = evaluated
    before = (folder / "results.json").stat().st_mtime_ns
    again = evaluate(models["student"], folder, replace(SHORT, evaluation_set=data), teacher=models["teacher"])
    assert again == results and (folder / "results.json").stat().st_mtime_ns == before
    assert results["date"] in caplog.text


def test_a_folder_belongs_to_one_process_at_a_time(evaluated, models, data, tmp_path, caplog):
    """A second process waits for the first, and reads what that one has found."""
    results, finished = evaluated
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    (folder / "results.json").unlink()
    with open(folder / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def finish():
            time.sleep(2)
            shutil.copy(finished / "results.json", folder)
            fcntl.flock(held, fcntl.LOCK_UN)

        first = threading.Thread(target=finish)
        first.start()
        found = evaluate(models["student"], folder, replace(SHORT, evaluation_set=data), teacher=models["teacher"])
        first.join()
    assert found == results
    assert "waiting for another process that works there" in caplog.text


def test_whole_numbers_are_printed_whole():
    metrics = {"reference_tokens": 123456, "rougeL": 12.3456}
    settings = {"model": "student", "evaluation_set": None}
    lines = table({"settings": settings, "metrics": metrics, "per_seed": {}, "date": ""}).splitlines()
    assert "| reference_tokens | 123456 |" in lines and "| rougeL | 12.35 |" in lines


def test_a_limit_takes_the_first_rows(tmp_path, models, data):
    settings = replace(SHORT, evaluation_set=data, limit=2)
    results = evaluate(models["student"], tmp_path / "out", settings)
    assert [row["prompt"] for row in results["rows"]] == [row["prompt"] for row in ROWS[:2]]


# ---- Named sets ----


def cached(home: Path, source: evaluation_sets.Source, rows: list[dict]) -> None:
    """The Hub's cache as a download would leave it."""
    repository = home / f"datasets--{source.dataset.replace('/', '--')}"
    file = repository / "snapshots" / "0123abc" / source.file
    file.parent.mkdir(parents=True)
    jsonl(file, rows)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")


def test_the_papers_sets_are_there():
    assert evaluation_sets.names() == ["dolly", "self-inst", "sinst", "uinst", "vicuna"]
    assert {name: evaluation_sets.source(name).dataset for name in evaluation_sets.names()} == {
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
    cached(tmp_path, evaluation_sets.source(name), rows * 5001)
    loaded = evaluation_sets.load(name)
    assert len(loaded.examples) == (10000 if name == "uinst" else 10002)
    assert (loaded.name, loaded.version, loaded.prompt_tokens) == (name, 1, 256)
    assert loaded.examples[0] == evaluation_sets.Example(row["prompt"], ["It."])
    assert loaded.examples[1].references == ["It.", "That."]
    assert len(evaluation_sets.load(name, limit=3).examples) == 3


def test_a_long_prompt_of_a_named_set_keeps_its_first_256_tokens(tmp_path, monkeypatch, models):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    rows = [{"prompt": "count " * 200 + "\n", "output": "No."}, {"prompt": "Count.\n", "output": "One."}]
    cached(tmp_path / "hub", evaluation_sets.source("dolly"), rows)
    settings = replace(SHORT, evaluation_set="dolly", seeds=(10,))
    results = evaluate(models["student"], tmp_path / "out", settings)
    assert results["metrics"]["cut_prompts"] == 1 and results["settings"]["set_version"] == 1
    prompt, answer = tokens_of(rows[0], "No.")
    assert len(prompt) > 256
    logits = logits_behind(models["student"], prompt[:256], answer)
    assert results["rows"][0]["nll"] == pytest.approx(float(F.cross_entropy(logits, torch.tensor(answer))), rel=1e-5)


# ---- lm-eval-harness ----


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
    assert "| answers/acc |" in (tmp_path / "out" / "results.md").read_text()


def test_an_unknown_task_is_named_before_anything_is_measured(tmp_path, models, data, capsys):
    pytest.importorskip("lm_eval")
    flags = ("--evaluation-set", data, "--lm-eval", "arc_easy,arc_esay", "--output-dir", str(tmp_path / "out"))
    error = refused(capsys, models["student"], *flags)
    assert "no task arc_esay," in error
    assert not (tmp_path / "out").exists()


# ---- Bad input ----


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([{"prompt": "a"}], "line 1: no reference"),
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
    assert "line 3: not JSON" in error


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


def test_messages_need_a_chat_template(tmp_path, capsys):
    tokenizer = tiny_tokenizer(chat_template=None)
    student = save_tiny(tmp_path / "student", tiny_llama(tokenizer), tokenizer)
    data = jsonl(tmp_path / "rows.jsonl", [ROWS[5]])
    error = refused(capsys, str(student), "--evaluation-set", data, "--output-dir", str(tmp_path / "out"))
    assert "chat template" in error or "chat_template" in error


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path, models, data, capsys):
    tokenizer = tiny_tokenizer(vocab_size=330)
    teacher = save_tiny(tmp_path / "teacher", tiny_llama(tokenizer), tokenizer)
    flags = ("--evaluation-set", data, "--teacher", str(teacher), "--output-dir", str(tmp_path / "out"))
    assert "need the same tokenizer" in refused(capsys, models["student"], *flags)


def test_a_folder_of_other_settings_is_refused_with_what_differs(evaluated, models, data, capsys):
    _, folder = evaluated
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    flags = ["--evaluation-set", data, "--teacher", models["teacher"], "--batch-size", "3", "--max-new-tokens", "24"]
    error = refused(capsys, models["student"], *flags, "--seeds", "10", "30", "--output-dir", str(folder))
    assert "seeds [10, 20], not [10, 30]" in error and "max_new_tokens" not in error
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_model_that_was_trained_on_is_another_one(tmp_path, models, data):
    tokenizer = tiny_tokenizer()
    student = AutoModelForCausalLM.from_pretrained(models["student"])
    settings = replace(SHORT, evaluation_set=data, seeds=(10,))
    evaluate(student, tmp_path / "out", settings, tokenizer=tokenizer)
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(ValueError, match="other settings: weights"):
        evaluate(student, tmp_path / "out", settings, tokenizer=tokenizer)


def test_other_rows_in_the_same_file_are_another_set(tmp_path, models):
    settings = replace(SHORT, evaluation_set=jsonl(tmp_path / "rows.jsonl", ROWS[:2]), seeds=(10,))
    evaluate(models["student"], tmp_path / "out", settings)
    jsonl(tmp_path / "rows.jsonl", ROWS[1:3])
    with pytest.raises(ValueError, match="other settings: set_rows"):
        evaluate(models["student"], tmp_path / "out", settings)


def test_another_teacher_at_the_same_path_is_another_one(tmp_path, models, data):
    tokenizer, settings = tiny_tokenizer(), replace(SHORT, evaluation_set=data, seeds=(10,), limit=1)
    teacher = str(save_tiny(tmp_path / "teacher", tiny_llama(tokenizer, seed=1), tokenizer))
    evaluate(models["student"], tmp_path / "out", settings, teacher=teacher)
    save_tiny(tmp_path / "teacher", tiny_llama(tokenizer, seed=2), tokenizer)
    with pytest.raises(ValueError, match="other settings: teacher_weights"):
        evaluate(models["student"], tmp_path / "out", settings, teacher=teacher)


def test_results_of_something_else_are_not_overwritten(tmp_path, models, data):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a results\.json of something else"):
        evaluate(models["student"], tmp_path, replace(SHORT, evaluation_set=data))
    assert (tmp_path / "results.json").read_text() == "{}"
