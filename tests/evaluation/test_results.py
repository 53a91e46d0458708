"""The folder of an evaluation: what is written, killed and gone on with, and what of it is refused."""

import fcntl
import json
import os
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
from evaluating import ROWS, SHORT, jsonl, refused
from peft import LoraConfig, get_peft_model
from processes import Forked
from tiny import CHATML, save_tiny, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from amid_trl import cli
from amid_trl.evaluation.evaluate import evaluate
from amid_trl.evaluation.results import results_table


ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "LOCAL_RANK"))}


def test_a_killed_run_goes_on_and_ends_in_the_results_of_one_that_was_not(tmp_path, models, rows_file, capsys):
    killed, file = tmp_path / "killed", tmp_path / "killed" / "completions.jsonl"
    command = [
        *("evaluate", models["student"], "--teacher", models["teacher"], "--evaluation-set", rows_file),
        *("--output-dir", str(killed), "--batch-size", "1", "--max-new-tokens", "24"),
        *("--seeds", *map(str, range(20))),
    ]
    process = Forked("amid_trl", *command, environment=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= 20) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    written = file.read_bytes()
    whole_lines = written[: written.rindex(b"\n") + 1]
    assert 20 <= whole_lines.count(b"\n") < 20 * len(ROWS) and not (killed / "results.json").exists()
    file.write_bytes(whole_lines + b'{"seed": 19, "batch": 6, "completio')

    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert "| rougeL |" in printed.out and f"completions: 100%|██████████| {20 * len(ROWS)}/" in printed.err
    assert file.read_bytes().startswith(whole_lines)
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 20 * len(ROWS)

    settings = replace(SHORT, evaluation_set=rows_file, batch_size=1, seeds=tuple(range(20)))
    evaluate(models["student"], tmp_path / "whole", settings, teacher=models["teacher"])
    resumed, whole = (json.loads((folder / "results.json").read_text()) for folder in (killed, tmp_path / "whole"))
    del resumed["date"], whole["date"]
    assert resumed == whole


def test_the_results_say_what_they_are_of(evaluated, models, rows_file):
    results, folder = evaluated
    assert set(results) == {
        "settings", "versions", "date", "metrics", "per_seed", "rows", "completions",
    }  # fmt: skip
    settings = results["settings"]
    assert settings["model"] == models["student"] and settings["teacher"] == models["teacher"]
    assert settings["evaluation_set"] == rows_file and settings["seeds"] == [10, 20]
    assert results["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(results["completions"]) == 2 * len(ROWS)
    table = (folder / "results.md").read_text()
    assert "| metric | what it is | value | seed 10 | seed 20 |" in table
    rouge = f"{results['metrics']['rougeL']:.4g} | {results['per_seed']['10']['rougeL']:.4g} |"
    assert f"| rougeL | ROUGE-L, percent (more is better) | {rouge}" in table


def test_a_finished_folder_is_not_measured_again(evaluated, models, rows_file, caplog):
    results, folder = evaluated
    before = (folder / "results.json").stat().st_mtime_ns
    again = evaluate(models["student"], folder, replace(SHORT, evaluation_set=rows_file), teacher=models["teacher"])
    assert again == results and (folder / "results.json").stat().st_mtime_ns == before
    assert results["date"] in caplog.text


def test_a_folder_belongs_to_one_process_at_a_time(evaluated, models, rows_file, tmp_path, caplog):
    """A second process waits for the first, and reads what that one has found."""
    (results, finished), settings = evaluated, replace(SHORT, evaluation_set=rows_file)
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
        found = evaluate(models["student"], folder, settings, teacher=models["teacher"])
        first.join()
    assert found == results
    assert "waiting for another process that works there" in caplog.text


def test_whole_numbers_are_printed_whole():
    metrics = {"reference_tokens": 123456, "rougeL": 12.3456}
    settings = {"model": "student", "evaluation_set": None}
    lines = results_table({"settings": settings, "metrics": metrics, "per_seed": {}, "date": ""}).splitlines()
    assert "| reference_tokens | that were scored | 123456 |" in lines
    assert "| rougeL | ROUGE-L, percent (more is better) | 12.35 |" in lines


def test_what_was_not_asked_for_is_not_in_the_table():
    settings = {"model": "student", "evaluation_set": "rows.jsonl", "limit": None, "lm_eval": (), "temperature": 1.0}
    table = results_table({"settings": settings, "metrics": {"task/acc": 0.5}, "per_seed": {}, "date": "today"})
    assert table.splitlines()[-1] == "today; model student, evaluation_set rows.jsonl, temperature 1.0"
    assert "| task/acc |  | 0.5 |" in table


# ---- A folder of something else ----


def test_a_folder_of_other_settings_is_refused_with_what_differs(evaluated, models, rows_file, capsys):
    _, folder = evaluated
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    flags = ["--evaluation-set", rows_file, "--teacher", models["teacher"], "--batch-size", "3"]
    more = ["--max-new-tokens", "24", "--seeds", "10", "30", "--output-dir", str(folder)]
    error = refused(capsys, models["student"], *flags, *more)
    assert "seeds [10, 20], not [10, 30]" in error and "max_new_tokens" not in error
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_model_that_was_trained_on_is_another_one(tmp_path, models, rows_file):
    tokenizer = tiny_tokenizer()
    student = AutoModelForCausalLM.from_pretrained(models["student"])
    settings = replace(SHORT, evaluation_set=rows_file, seeds=(10,))
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


def test_another_teacher_at_the_same_path_is_another_one(tmp_path, models, rows_file):
    tokenizer, settings = tiny_tokenizer(), replace(SHORT, evaluation_set=rows_file, seeds=(10,), limit=1)
    teacher = str(save_tiny(tmp_path / "teacher", tiny_llama(tokenizer, seed=1), tokenizer))
    evaluate(models["student"], tmp_path / "out", settings, teacher=teacher)
    save_tiny(tmp_path / "teacher", tiny_llama(tokenizer, seed=2), tokenizer)
    with pytest.raises(ValueError, match="other settings: teacher_weights"):
        evaluate(models["student"], tmp_path / "out", settings, teacher=teacher)


def test_settings_that_came_to_nothing_may_be_others(tmp_path, models, rows_file):
    settings = replace(SHORT, evaluation_set=rows_file, seeds=(10,), limit=2)
    evaluate(models["student"], tmp_path / "out", settings)
    (tmp_path / "out" / "results.json").unlink()
    (tmp_path / "out" / "completions.jsonl").unlink()
    evaluate(models["student"], tmp_path / "out", replace(settings, limit=1))
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["limit"] == 1


def test_the_same_models_under_another_path_are_the_same(evaluated, models, rows_file):
    results, folder = evaluated
    student, teacher = (os.path.relpath(models[name]) for name in ("student", "teacher"))
    assert evaluate(student, folder, replace(SHORT, evaluation_set=rows_file), teacher=teacher) == results


def test_a_model_that_reads_other_tokens_is_another_one(tmp_path, models, rows_file):
    settings = replace(SHORT, evaluation_set=rows_file, seeds=(10,))
    evaluate(models["student"], tmp_path / "out", settings)
    other = tiny_tokenizer(chat_template=CHATML.replace("message['role'] +", "message['role'] + '!' +"))
    assert other.chat_template != CHATML
    with pytest.raises(ValueError, match="other settings: row_tokens"):
        evaluate(models["student"], tmp_path / "out", settings, tokenizer=other)


def test_an_adapter_with_another_scaling_is_another_one(tmp_path, models, rows_file):
    base = AutoModelForCausalLM.from_pretrained(models["student"])
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    settings = replace(SHORT, evaluation_set=rows_file, seeds=(10,), limit=1)
    evaluate(str(tmp_path / "adapter"), tmp_path / "out", settings)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    with pytest.raises(ValueError, match="other settings: weights"):
        evaluate(str(tmp_path / "adapter"), tmp_path / "out", settings)


def test_completions_that_nobody_accounts_for_are_not_used(tmp_path, models, rows_file):
    (tmp_path / "completions.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"holds a completions\.jsonl of something else"):
        evaluate(models["student"], tmp_path, replace(SHORT, evaluation_set=rows_file))


def test_results_of_something_else_are_not_overwritten(tmp_path, models, rows_file):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a results\.json of something else"):
        evaluate(models["student"], tmp_path, replace(SHORT, evaluation_set=rows_file))
    assert (tmp_path / "results.json").read_text() == "{}"
