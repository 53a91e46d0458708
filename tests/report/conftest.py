"""What a report is made of, by the real commands on tiny models; nobody changes it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from compared import comparison, result, results
from evaluating import SHORT
from sweeping import CONTENT, written
from tiny import messages_dataset, tiny_llama, tiny_tokenizer

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.comparison.report import report
from amid_trl.evaluation.evaluate import evaluate
from amid_trl.sweep.report import write_sweep
from amid_trl.sweep.search import Search
from amid_trl.sweep.spec import read_sweep
from amid_trl.sweep.trials import Evaluated


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """A run with evaluations and a table of completions, as `amid-trl train` leaves it."""
    folder, tokenizer = tmp_path_factory.mktemp("runs") / "run", tiny_tokenizer()
    args = AMiDConfig(
        *(str(folder),),
        **{"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True},
        **{"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
        **{"lmbda": 1.0, "max_new_tokens": 4, "log_completions": True, "eval_strategy": "steps", "eval_steps": 2},
    )
    models = tiny_llama(tokenizer, seed=0), tiny_llama(tokenizer, seed=1)
    data = {"train_dataset": messages_dataset(8), "eval_dataset": messages_dataset(4)}
    trainer = AMiDTrainer(*models, args, processing_class=tokenizer, **data)
    trainer.train()
    trainer.save_state()
    return folder


@pytest.fixture(scope="session")
def evaluated_teacher(tmp_path_factory, models, rows_file) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "teacher"
    evaluate(models["teacher"], folder, replace(SHORT, evaluation_set=rows_file), teacher=models["teacher"])
    return folder


@pytest.fixture(scope="session")
def comparison_folder(tmp_path_factory, run_folder, evaluated) -> Path:
    """A comparison whose run `low` has kept its logs and its evaluation."""
    folder = tmp_path_factory.mktemp("compared") / "study"
    asked, some = comparison("kd", "low", "high"), results(kd=1.0, low=0.8, high=1.2)
    found = report(asked, {**some, asked.untrained: result(2.0, 0)})
    first = folder / "low" / "seed-0"
    (first / "evaluation").mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps(found))
    (first / "trainer_state.json").write_bytes((run_folder / "trainer_state.json").read_bytes())
    (first / "evaluation" / "results.json").write_text(json.dumps(evaluated[0]))
    return folder


@pytest.fixture(scope="session")
def landscape_folder(tmp_path_factory, measured) -> Path:
    folder = tmp_path_factory.mktemp("landscape") / "grid"
    folder.mkdir()
    points = [point for point in measured["points"] if point["temperature"] == 1.0]
    (folder / "landscape.json").write_text(json.dumps({**measured, "points": points}))
    return folder


@pytest.fixture(scope="session")
def sweep_folder(tmp_path_factory) -> Path:
    """A sweep of made-up figures in a real study: eight trials that ended, one that was pruned, one that failed."""
    folder = tmp_path_factory.mktemp("swept") / "search"
    folder.mkdir()
    space = {"assistant_alpha": {"low": -5, "high": 1}, "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    content = {**CONTENT, "space": {**space, "divergence": ["kl", "js"]}, "trials": 10}
    search = Search(*read_sweep(written(folder.parent, content)), folder)
    while (trial := search.next_trial()) is not None:
        value = trial.parameters["assistant_alpha"] ** 2 + (trial.parameters["divergence"] == "js")
        search.report(trial, Evaluated(5, value + 1))
        if trial.number == 6:
            search.prune(trial, Evaluated(5, value + 1))
        elif trial.number == 7:
            search.fail(trial, "FAILED with status 1; the end of log.txt:\n    <b>it is too warm</b>")
        else:
            search.complete(trial, Evaluated(10, value, "rows"))
    write_sweep(search)
    return folder
