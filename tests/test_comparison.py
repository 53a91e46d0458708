"""What a comparison may not say is an error that names it, before anything is trained."""

from pathlib import Path

import pytest
import yaml

from amid_trl import cli
from amid_trl.comparison import TRAINING_METRICS, check_configs, fingerprint, read_comparison
from amid_trl.token_loss import FIGURES


@pytest.fixture
def content(tmp_path, tiny_dir) -> dict:
    return {
        "base": {
            "model_name_or_path": str(tiny_dir),
            "teacher_model_name_or_path": str(tiny_dir),
            "dataset_name": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
        },
        "runs": {"kd": {"objective": "kd"}, "amid": {}},
        "seeds": [0, 1],
        "metrics": ["eval_kl"],
        "budget": {"steps": 2},
    }


def written(tmp_path: Path, content: dict) -> Path:
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def refused(tmp_path: Path, content: dict) -> str:
    """The message, when neither the file nor its configurations are accepted."""
    with pytest.raises(ValueError) as error:
        check_configs(read_comparison(written(tmp_path, content)))
    return str(error.value)


def test_a_run_is_the_base_with_what_it_changes_the_seed_and_the_budget(tmp_path, content):
    comparison = read_comparison(written(tmp_path, content))
    check_configs(comparison)
    assert comparison.settings("kd", 1) == {
        "config": {**content["base"], "objective": "kd", "seed": 1, "max_steps": 2},
        "budget": {"steps": 2},
        "evaluates": True,
    }
    assert comparison.works == [("kd", 0), ("amid", 0), ("kd", 1), ("amid", 1)]
    assert comparison.baseline == "kd"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": {"kd": {"objective": "kdd"}}}, "runs.kd: unknown objective 'kdd'; there are kd, rkl, "),
        ({"runs": {"kd": {"objectiv": "kd"}}}, "runs.kd: .*unrecognized arguments: --objectiv"),
        ({"runs": {"kd": {"objective": "kd", "assistant_alpha": 1.0}}}, "runs.kd: assistant_alpha has no effect"),
        ({"runs": {"kd": {"learning_rate": "quick"}}}, "runs.kd: .*learning_rate.*'quick'"),
        ({"runs": {"kd": {"seed": 3}}}, "kd may not have seed: the comparison sets them"),
        ({"runs": {"../kd": {}}}, "got '../kd'"),
        ({"runs": {"kd": ["objective"]}}, "runs.kd must be a mapping"),
        ({"runs": {}}, "runs must be given"),
        ({"metrics": ["eval_kl", "eval_loss"]}, "unknown 'eval_loss'; there are eval_kl, "),
        ({"metrics": ["rougeL"]}, "rougeL is measured by amid-trl evaluate; give its options"),
        ({"evaluate": {"evaluation_set": "dolly"}}, "evaluate has no effect"),
        ({"seeds": [1, 1]}, r"seeds must be different integers; got \[1, 1\]"),
        ({"seeds": 3}, "seeds must be a list; got 3"),
        ({"metrics": "eval_kl"}, "metrics must be a list; got 'eval_kl'"),
        ({"seeds": [0.5]}, r"seeds must be different integers; got \[0.5\]"),
        ({"baseline": "rkl"}, "baseline 'rkl' is not among the runs kd, amid"),
        ({"budget": {"epochs": 1}}, "exactly one of steps, tokens, minutes; got {'epochs': 1}"),
        ({"budget": {"steps": 1, "tokens": 10}}, "exactly one of steps, tokens, minutes"),
        ({"budget": {"steps": 0}}, "steps must be a positive number; got 0"),
        ({"budget": {"steps": 1.5}}, "steps must be a positive number; got 1.5"),
        ({"budget": {"tokens": 100}}, "a budget of tokens needs max_steps too"),
        ({"budget": 10}, "budget must be a mapping; got 10"),
        ({"alphas": [1]}, "unknown keys alphas; there are base, runs, "),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path, content, change, message):
    with pytest.raises(ValueError, match=message):
        check_configs(read_comparison(written(tmp_path, content | change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": 3}, "base may not have max_steps"),
        ({"output_dir": "out"}, "base may not have output_dir"),
        ({"model_name_or_path": None}, "runs.kd: model_name_or_path is missing"),
        ({"num_proceses": 2}, "runs.kd: .*--num_proceses"),
    ],
)
def test_a_base_that_cannot_be_trained_is_named(tmp_path, content, change, message):
    content["base"] |= change
    with pytest.raises(ValueError, match=message):
        check_configs(read_comparison(written(tmp_path, content)))


def test_a_budget_of_tokens_needs_them_counted(tmp_path, content):
    content["base"] |= {"max_steps": 9, "include_num_input_tokens_seen": "no"}
    assert "needs include_num_input_tokens_seen" in refused(tmp_path, content | {"budget": {"tokens": 100}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluation_set": "none.jsonl"}, "none.jsonl"),
        ({"evaluation_set": "dolly", "sedes": [1]}, "evaluate: .*sedes"),
        ({"evaluation_set": "dolly", "temperature": 0}, "evaluate: temperature must be positive"),
        ({"lm_eval": "gsm8k"}, "no figure of lm_eval is a metric here"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_named(tmp_path, content, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        check_configs(read_comparison(written(tmp_path, content | {"metrics": ["rougeL"], "evaluate": options})))


def test_the_launchers_settings_are_settings(tmp_path, content):
    content["base"] |= {"num_processes": 2}
    check_configs(read_comparison(written(tmp_path, content)))


def test_the_command_says_so_and_leaves_nothing(tmp_path, content, capsys):
    file = written(tmp_path, content | {"runs": {"kd": {"objective": "kdd"}}})
    assert cli.main(["compare", str(file), "--output-dir", str(tmp_path / "out")]) == 2
    assert "amid-trl compare: runs.kd: unknown objective 'kdd'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_environment_of_one_run_is_not_that_of_the_next(tmp_path, content, monkeypatch):
    monkeypatch.setenv("AMID_TEST", "before")
    content["runs"]["kd"]["env"] = {"AMID_TEST": "inside"}
    check_configs(read_comparison(written(tmp_path, content)))
    import os

    assert os.environ["AMID_TEST"] == "before"


def test_the_metrics_of_training_are_figures_of_the_trainer():
    assert {name.removeprefix("eval_") for name in TRAINING_METRICS} <= set(FIGURES)


def test_a_fingerprint_is_of_the_settings_not_of_their_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
