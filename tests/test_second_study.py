"""The second part of the study, which takes hours: what it asks for, and all of it on tiny models."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from evaluating import jsonl
from tiny import messages_dataset, save_tiny, tiny_llama, tiny_tokenizer

from amid_trl.comparison.spec import check_configs, read_comparison
from amid_trl.sweep.spec import check_space, read_sweep


FOLDER = Path(__file__).parents[1] / "examples" / "study"


@pytest.fixture(scope="module")
def second():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import second

        yield second


@pytest.fixture(scope="module")
def spec(tmp_path_factory, tiny_dir) -> dict:
    """As it is, with tiny models in place of the pair."""
    folder, tokenizer = tmp_path_factory.mktemp("pair"), tiny_tokenizer()
    teacher = save_tiny(folder / "teacher", tiny_llama(tokenizer, seed=1), tokenizer)
    (folder / "data").mkdir()
    messages_dataset(8).to_json(folder / "data" / "train.jsonl")
    messages_dataset(6).to_json(folder / "data" / "test.jsonl")
    rows = [{"prompt": f"Question {i}?", "references": ["An answer.", "No."]} for i in range(3)]
    content = yaml.safe_load((FOLDER / "second.yaml").read_text())
    models = {"model_name_or_path": str(tiny_dir), "teacher_model_name_or_path": str(teacher)}
    content["sweep"]["base"] = {"dataset_name": str(folder / "search")}
    shutil.copytree(folder / "data", folder / "search")
    content["base"] |= {**models, "dataset_name": str(folder / "data"), "use_cpu": True, "max_new_tokens": 4}
    content["compare"]["evaluate"] |= {
        **{"evaluation_set": jsonl(folder / "questions.jsonl", rows), "teacher": str(teacher), "max_new_tokens": 4},
    }
    return content


def written(file: Path, content: dict) -> Path:
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_every_run_has_a_sweep_of_its_own_that_differs_in_its_objective_alone(second, spec, tmp_path):
    sweeps = second.sweeps(spec)
    assert list(sweeps) == list(spec["runs"])
    read = {name: read_sweep(written(tmp_path / "sweep.yaml", content))[0] for name, content in sweeps.items()}
    for name, sweep in read.items():
        check_space(sweep)
        tuned = name.endswith("-tuned")
        assert set(sweep.space) == {"learning_rate", *(("assistant_alpha", "assistant_lambda") if tuned else ())}
        assert sweep.trials == (8 if tuned else 4)
        assert sweep.base == {**spec["base"], **spec["runs"][name], **spec["sweep"]["base"]}
        assert (sweep.steps, sweep.seed) == (20, 7)


def test_the_comparison_has_what_the_sweeps_have_found(second, spec, tmp_path):
    best = {name: {"learning_rate": 1e-3 * (i + 1)} for i, name in enumerate(spec["runs"])}
    comparison = read_comparison(written(tmp_path / "compare.yaml", second.comparison(spec, best)))
    check_configs(comparison)
    assert len(comparison.seeded_runs) == 3 * len(spec["runs"]) == 21
    assert comparison.settings("rkl", 1)["config"] == {
        **{**spec["base"], "objective": "rkl", "learning_rate": 2e-3, "seed": 1, "max_steps": 100},
    }


def test_runs_can_be_made_a_few_at_a_time_and_the_baseline_is_always_among_them(second, spec):
    assert list(second.chosen(spec, ["kd-T2", "rkl"])["runs"]) == ["kd", "rkl", "kd-T2"]
    assert second.chosen(spec, list(spec["runs"])) == spec
    with pytest.raises(ValueError, match="runs: unknown 'rlk'; there are kd, rkl, gkd, "):
        second.chosen(spec, ["rlk"])


def test_settings_are_chosen_by_rows_that_the_comparison_does_not_have(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import prepare

    rows = [{"prompt": [{"content": f"{i // 2}?"}], "answer": i} for i in range(200)]
    found = prepare.for_searching(rows)
    assert [row["answer"] for split in ("train", "test") for row in found[split]] == list(range(200))
    assert [row["answer"] for row in found["test"]] == list(range(200 - 2 * prepare.SEARCHED_BY, 200))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_of_it_on_tiny_models(second, spec, tmp_path, monkeypatch):
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    runs = {name: spec["runs"][name] for name in ("kd", "rkl", "amid-ab-tuned")}
    sweep = {**spec["sweep"], "trials": 1, "trials_of_more": 1, "evaluations": 1, "budget": {"steps": 2}}
    small = {**spec, "runs": runs, "sweep": sweep}
    small["compare"] = {**spec["compare"], "seeds": [0], "budget": {"steps": 2}}
    file, out = written(tmp_path / "spec.yaml", small), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["second.py", str(out), "--spec", str(file), "--runs", "amid-ab-tuned"])
    second.main()
    first = json.loads((out / "compare" / "comparison.json").read_text())
    assert list(first["runs"]) == ["kd", "amid-ab-tuned"]
    monkeypatch.setattr(sys, "argv", ["second.py", str(out), "--spec", str(file)])
    second.main()
    found = json.loads((out / "compare" / "comparison.json").read_text())
    assert found["runs"].keys() == runs.keys() and found["missing"] == []
    assert all(found["runs"][name]["metrics"] == run["metrics"] for name, run in first["runs"].items())
    for name in runs:
        best = json.loads((out / "sweeps" / name / "sweep.json").read_text())["best"]["settings"]
        settings = json.loads((out / "compare" / name / "seed-0" / "settings.json").read_text())["config"]
        assert best.items() <= settings.items()
    before = (out / "compare" / "comparison.json").read_bytes()
    second.main()  # nothing is left to do
    assert (out / "compare" / "comparison.json").read_bytes() == before
