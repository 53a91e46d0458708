"""What a comparison may not say is an error that names it, before anything is trained."""

import json
import os
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml
from tiny import messages_dataset

from amid_trl import cli
from amid_trl.comparison.spec import check_configs, read_comparison
from amid_trl.evaluation.metrics import TRAINING_METRICS
from amid_trl.maths.token_loss import DistillationTokenLoss
from amid_trl.outputs import differences, fingerprint, plain_json


@pytest.fixture
def content(tmp_path, tiny_dir) -> dict:
    for split in ("train", "test"):
        messages_dataset(2).to_json(tmp_path / "data" / f"{split}.jsonl")
    return {
        "base": {
            "model_name_or_path": str(tiny_dir),
            "teacher_model_name_or_path": str(tiny_dir),
            "dataset_name": str(tmp_path / "data"),
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
    assert comparison.seeded_runs == [("kd", 0), ("amid", 0), ("kd", 1), ("amid", 1)]
    assert comparison.baseline == "kd"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": {"kd": {"objective": "kdd"}}}, "runs.kd: unknown objective 'kdd'; there are kd, rkl, "),
        ({"runs": {"kd": {"objectiv": "kd"}}}, "runs.kd: unknown arguments: --objectiv"),
        ({"runs": {"kd": {"objective": "kd", "assistant_alpha": 1.0}}}, "runs.kd: assistant_alpha has no effect"),
        ({"runs": {"kd": {"learning_rate": "quick"}}}, "runs.kd: .*learning_rate.*'quick'"),
        ({"runs": {"kd": {"seed": 3}}}, "kd may not have seed: the comparison sets them"),
        ({"runs": {"../kd": {}}}, "got '../kd'"),
        ({"runs": {"..": {}}}, r"and \. but first; got '..'"),
        ({"runs": {"kd": ["objective"]}}, "runs.kd must be a mapping"),
        ({"runs": {"kd": []}}, "runs.kd must be a mapping"),
        ({"runs": {}}, "runs must be given"),
        ({"runs": {"before-training": {}}}, "before-training is the student that is not trained"),
        ({"metrics": ["eval_kl", "eval_loss"]}, "unknown 'eval_loss'; there are eval_kl, "),
        ({"metrics": [["eval_kl"]]}, r"unknown \['eval_kl'\]; there are eval_kl, "),
        ({"metrics": ["rougeL"]}, "rougeL is measured by amid-trl evaluate; give its options"),
        ({"metrics": ["rougeL"], "evaluate": "dolly"}, "evaluate must be a mapping; got 'dolly'"),
        *(
            ({"metrics": [metric], "evaluate": {"evaluation_set": "x"}}, f"{metric} compares with a teacher; give one")
            for metric in ("kl_pq", "top1_agreement", "teacher_perplexity")
        ),
        ({"evaluate": {"evaluation_set": "dolly"}}, "evaluate has no effect"),
        ({"runs": {"kd": {"objective": ["kd"]}}}, r"runs.kd: unknown objective \['kd'\]"),
        (
            {"runs": {"kd": {}, "other": {"teacher_model_name_or_path": "x"}}},
            "_path is not the same in all runs",
        ),
        ({"runs": {"kd": {}, "other": {"dataloader_drop_last": True}}}, "dataloader_drop_last leaves out rows"),
        ({"seeds": [1, 1]}, r"seeds must be different integers; got \[1, 1\]"),
        ({"seeds": 3}, "seeds must be a list; got 3"),
        ({"metrics": "eval_kl"}, "metrics must be a list; got 'eval_kl'"),
        ({"seeds": [0.5]}, r"seeds must be different integers; got \[0.5\]"),
        ({"seeds": [[1]]}, r"seeds must be different integers; got \[\[1\]\]"),
        ({"baseline": ["kd"]}, r"baseline must be a name; got \['kd'\]"),
        ({"baseline": "rkl"}, "baseline 'rkl' is not among the runs kd, amid"),
        ({"budget": {"epochs": 1}}, "exactly one of steps, tokens, minutes; got {'epochs': 1}"),
        ({"budget": {"steps": 1, "tokens": 10}}, "exactly one of steps, tokens, minutes"),
        ({"budget": {"steps": 0}}, "steps must be a positive number; got 0"),
        ({"budget": {"steps": 1.5}}, "steps must be a positive number; got 1.5"),
        ({"budget": {"minutes": float("nan")}}, "minutes must be a positive number; got nan"),
        ({"budget": {"minutes": float("inf")}}, "minutes must be a positive number; got inf"),
        ({"budget": {"tokens": 100}}, "a budget of tokens needs max_steps too"),
        ({"budget": 10}, "budget must be a mapping; got 10"),
        ({"alphas": [1], 2: 3}, "unknown keys 2, alphas; there are base, runs, "),
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
        ({"resume_from_checkpoint": "x"}, "base may not have resume_from_checkpoint"),
        ({"push_to_hub": True}, "base may not have push_to_hub"),
        ({"model_name_or_path": None}, "every run: model_name_or_path is missing"),
        ({"num_proceses": 2}, "every run: .*--num_proceses"),
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
        ({"evaluation_set": "dolly", "sedes": [1]}, "evaluate: unknown sedes; there are teacher, "),
        ({"evaluation_set": "dolly", "temperature": 0}, "evaluate: temperature must be positive"),
        ({"lm_eval": "gsm8k"}, "evaluate: unknown lm_eval; there are"),
        ({"output_dir": "x"}, "evaluate: unknown output_dir; there are"),
        ({"evaluation_set": "dolly", "dtype": "fp16"}, "evaluate: argument --dtype: invalid choice: 'fp16'"),
        ({"evaluation_set": "dolly", "batch_size": 8.0}, "evaluate: argument --batch-size: invalid int value: '8.0'"),
        ({"evaluation_set": "dolly", "limit": True}, "evaluate: argument --limit: expected one argument"),
        ({"limit": 3}, "evaluate: nothing to evaluate: name an evaluation_set"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_named(tmp_path, content, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        check_configs(read_comparison(written(tmp_path, content | {"metrics": ["rougeL"], "evaluate": options})))


def evaluation(tmp_path: Path, **options) -> dict:
    """Options of an evaluation on a set that there is."""
    file = tmp_path / "set.jsonl"
    file.write_text('{"prompt": "a", "reference": "b"}\n')
    return {"evaluation_set": str(file), **options}


def test_an_evaluation_without_rouge_score_is_refused_before_training(tmp_path, content, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    file = written(tmp_path, content | {"metrics": ["nll"], "evaluate": evaluation(tmp_path)})
    with pytest.raises(ImportError, match=r"pip install 'amid-trl\[eval\]'"):
        check_configs(read_comparison(file))


def test_metrics_of_evaluate_alone_need_no_evaluation_in_training(tmp_path, content):
    options = evaluation(tmp_path, teacher="t", dtype="float32", trust_remote_code=True)
    comparison = read_comparison(written(tmp_path, content | {"metrics": ["kl_pq"], "evaluate": options}))
    check_configs(comparison)
    assert not comparison.settings("kd", 0)["evaluates"]


def test_options_of_evaluate_are_flags_of_the_command(tmp_path, content):
    options = evaluation(tmp_path, seeds=[1, 2], top_p=0.9, trust_remote_code=True)
    comparison = read_comparison(written(tmp_path, content | {"metrics": ["rougeL"], "evaluate": options}))
    flags = ["--seeds", "1", "2", "--top-p", "0.9", "--trust-remote-code"]
    assert comparison.evaluate_flags == ["--evaluation-set", options["evaluation_set"], *flags]


def test_null_and_false_are_as_if_they_were_not_given(tmp_path, content):
    options = evaluation(tmp_path, limit=None, trust_remote_code=False, no_repeat_ngram_size=0)
    comparison = read_comparison(written(tmp_path, content | {"metrics": ["rougeL"], "evaluate": options}))
    assert dict(comparison.evaluate) == evaluation(tmp_path, no_repeat_ngram_size=0)


def test_a_file_that_is_not_yaml_is_named(tmp_path, capsys):
    file = tmp_path / "compare.yaml"
    file.write_text("runs: [")
    assert cli.main(["compare", str(file), "--output-dir", str(tmp_path / "out")]) == 2
    assert f"amid-trl compare: {file} is not YAML: " in capsys.readouterr().err


def test_a_key_that_is_there_twice_is_named(tmp_path, content):
    file = written(tmp_path, content)
    text = file.read_text()
    file.write_text(text.replace("  amid: {}", "  kd: {objective: rkl}"))
    with pytest.raises(ValueError, match=r"compare.yaml is not YAML: 'kd' is there twice in .* line \d+"):
        read_comparison(file)
    file.write_text(
        text.replace("runs:", "x: &one {objective: kd}\nruns:").replace("amid: {}", "amid: {<<: *one, a: 1}")
    )
    with pytest.raises(ValueError, match="unknown keys x"):  # it is read, anchors and merged keys too
        read_comparison(file)


@pytest.mark.parametrize("max_steps", [-1, "many"])
def test_the_schedules_of_every_run_need_max_steps(tmp_path, content, max_steps):
    content["base"]["max_steps"] = 9
    content["runs"]["amid"] = {"max_steps": max_steps}
    assert "runs.amid: a budget of tokens needs max_steps" in refused(tmp_path, content | {"budget": {"tokens": 100}})


def test_the_launchers_settings_are_settings(tmp_path, content):
    content["base"] |= {"num_processes": 2}
    comparison = read_comparison(written(tmp_path, content))
    check_configs(comparison)
    assert comparison.settings("kd", 0)["config"]["num_processes"] == 2


def test_the_command_says_so_and_leaves_nothing(tmp_path, content, capsys):
    file = written(tmp_path, content | {"runs": {"kd": {"objective": "kdd"}}})
    assert cli.main(["compare", str(file), "--output-dir", str(tmp_path / "out")]) == 2
    assert "amid-trl compare: runs.kd: unknown objective 'kdd'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": {"dataset_test_split": "dev"}}, "every run: the dataset has no split 'dev' (dataset_test_split)"),
        ({"runs": {"kd": {"dataset_train_split": "all"}}}, "runs.kd: the dataset has no split 'all'"),
    ],
)
def test_data_is_looked_at_before_training(tmp_path, content, change, message):
    for part, settings in change.items():
        for name, value in settings.items():
            content[part][name] = {**content[part].get(name, {}), **value} if isinstance(value, dict) else value
    assert refused(tmp_path, content).startswith(message)


def test_an_evaluation_set_is_needed_by_metrics_of_training_alone(tmp_path, content):
    (tmp_path / "data" / "test.jsonl").unlink()
    assert "no split 'test'" in refused(tmp_path, content)
    check_configs(
        read_comparison(written(tmp_path, content | {"metrics": ["rougeL"], "evaluate": evaluation(tmp_path)}))
    )


def test_an_environment_of_one_run_is_not_that_of_the_next(tmp_path, content, monkeypatch):
    monkeypatch.setenv("AMID_TEST", "before")
    content["runs"]["kd"]["env"] = {"AMID_TEST": "inside"}
    check_configs(read_comparison(written(tmp_path, content)))
    assert os.environ["AMID_TEST"] == "before"


def test_the_metrics_of_training_are_figures_of_the_trainer():
    assert {name.removeprefix("eval_") for name in TRAINING_METRICS} <= set(DistillationTokenLoss.figures)


def test_a_fingerprint_is_of_the_settings_not_of_their_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_settings_are_the_same_when_json_has_made_text_of_their_keys():
    memory = {"teacher_model_init_kwargs": {"max_memory": {0: "20GiB"}}, "teacher_model_revision": date(2026, 1, 1)}
    read = json.loads(json.dumps(plain_json(memory)))
    assert read != memory and differences(read, memory) == ""
    memory["teacher_model_init_kwargs"]["max_memory"] = {1: "20GiB"}
    assert "'0': '20GiB'" in differences(read, memory)
