"""What an earlier version left on disk still opens, and comes to the same: tests/golden/formats, see write.py there.

A run from a checkpoint draws the same completions and rows and follows the same losses as the version that saved it.
"""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

from amid_trl import AMiDConfig, AMiDTrainer, cli
from amid_trl.teacher.cache import TeacherCache


ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "formats"
STUDY = ROOT / "examples" / "study"
RUNS = json.loads((GOLDEN / "runs.json").read_text())
ORIGIN = json.loads((GOLDEN / "origin.json").read_text())


@pytest.fixture(autouse=True)
def in_a_copy(tmp_path, monkeypatch):
    """The golden files, under the relative paths that are written in them."""
    shutil.copytree(GOLDEN, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def test_the_files_say_what_wrote_them():
    assert len(ORIGIN["commit"]) == 40 and {"torch", "transformers", "trl"} <= set(ORIGIN["versions"])


# ---- Checkpoints ----


def resumed(name: str, **changed) -> AMiDTrainer:
    run = RUNS[name]
    trainer = AMiDTrainer(
        "student",
        "teacher",
        AMiDConfig("resumed", **{**run["settings"], "save_strategy": "no", **changed}),
        train_dataset=Dataset.from_json("data/train.jsonl"),
        eval_dataset=Dataset.from_json("data/test.jsonl"),
        peft_config=LoraConfig(**run["lora"]) if "lora" in run else None,
    )
    trainer.train(resume_from_checkpoint=f"checkpoints/{name}/checkpoint-4")
    return trainer


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_its_checkpoint_as_it_would_have(name):
    trainer, run = resumed(name), RUNS[name]
    log = {("eval_loss" in entry, entry["step"]): entry for entry in trainer.state.log_history[:-1]}  # but the summary
    steps = [entry for entry in run["log"] if "loss" in entry]
    assert [entry["step"] for entry in steps] == [5, 6, 7, 8]
    # The state in the checkpoint is not what a new run would begin with.
    assert {entry["on_policy_share"] for entry in steps} == {0.0, 1.0}
    for wanted in run["log"]:
        got = log["eval_loss" in wanted, wanted["step"]]
        assert {key: got[key] for key in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-6), wanted["step"]
    trainer.save_model("saved")
    [file] = Path("saved").glob("*model.safetensors")
    squares = {key: weight.double().square().sum().item() for key, weight in load_file(file).items()}
    assert squares == pytest.approx(run["squares_of_weights"], rel=1e-5)


def test_the_state_of_an_adaptive_run_is_of_use():
    log = RUNS["adaptive"]["log"]
    assert {entry["replay_share"] for entry in log if "loss" in entry} == {0.0, 1.0}
    settings = RUNS["adaptive"]["settings"]
    assert all(entry["adaptive_threshold"] > settings["adaptive_threshold"] for entry in log if "loss" in entry)


def test_another_state_in_the_checkpoint_is_another_run():
    """The comparison with the golden log can fail: here some of the plain text is lost."""
    file = Path("checkpoints/taid/checkpoint-4/distillation_state_0.pt")
    state = torch.load(file, weights_only=True)
    state["plain_text"]["tokens"] = []
    torch.save(state, file)
    log = [entry for entry in resumed("taid").state.log_history if entry["step"] == 5]
    [wanted] = [entry for entry in RUNS["taid"]["log"] if entry["step"] == 5]
    assert log[0]["pretrain_nll"] != pytest.approx(wanted["pretrain_nll"], rel=1e-4)


# ---- A teacher's cache ----


def test_a_cache_has_the_rows_that_were_written():
    golden = json.loads(Path("cache.json").read_text())
    cache = TeacherCache("cache")
    assert len(cache) == len(golden) > 0
    for key, row in golden.items():
        ids, log_p, log_tail = cache.row(bytes.fromhex(key))
        assert ids.tolist() == row["ids"]
        torch.testing.assert_close(log_p, torch.tensor(row["log_p"]), rtol=0, atol=1e-6)
        torch.testing.assert_close(log_tail, torch.tensor(row["log_tail"]), rtol=0, atol=1e-6)


def test_a_cache_trains_the_rows_that_it_was_written_for():
    """Tokenizer, template and key of a row are those of the version that wrote it."""
    settings = {**RUNS["taid"]["settings"], "objective": "kd", "assistant_lambda_schedule": None, "lmbda": 0.0}
    settings |= {"teacher_model_name_or_path": "teacher", "teacher_cache": "cache", "teacher_top_k": 4}
    settings |= {"pretrain_dataset": None, "max_length": 1024, "max_steps": 1, "save_strategy": "no"}
    train_dataset = Dataset.from_json("data/train.jsonl")
    trainer = AMiDTrainer("student", None, AMiDConfig("cached", **settings), train_dataset=train_dataset)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] > 0


# ---- An evaluation ----

with_the_same_transformers = pytest.mark.skipif(
    version("transformers") != ORIGIN["versions"]["transformers"],
    reason="an evaluation is of one configuration of the model, which other versions write with other fields",
)


def evaluate(folder: str) -> dict:
    settings = json.loads(Path(folder, "settings.json").read_text())
    flags = ["--teacher", settings["teacher"], "--evaluation-set", settings["evaluation_set"]]
    flags += ["--batch-size", str(settings["batch_size"]), "--max-new-tokens", str(settings["max_new_tokens"])]
    flags += ["--seeds", *map(str, settings["seeds"]), "--output-dir", folder]
    assert cli.main(["evaluate", settings["model"], *flags]) == 0
    return json.loads(Path(folder, "results.json").read_text())


@with_the_same_transformers
def test_a_finished_evaluation_is_returned():
    before = {file.name: file.read_bytes() for file in Path("evaluations/finished").iterdir()}
    evaluate("evaluations/finished")
    assert {name: Path("evaluations/finished", name).read_bytes() for name in before} == before


@with_the_same_transformers
def test_half_an_evaluation_goes_on_to_the_results_of_a_whole_one():
    begun = Path("evaluations/half/completions.jsonl").read_bytes()
    whole_lines = begun[: begun.rindex(b"\n") + 1]
    assert len(whole_lines) < len(begun)
    results = evaluate("evaluations/half")
    wanted = json.loads(Path("evaluations/finished/results.json").read_text())
    assert Path("evaluations/half/completions.jsonl").read_bytes().startswith(whole_lines)
    assert set(results) == set(wanted)
    assert results["settings"] == wanted["settings"]
    added = {"bits_per_byte", "reference_bytes"}  # since then
    assert set(results["metrics"]) == set(wanted["metrics"]) | added
    kept = {name: value for name, value in results["metrics"].items() if name not in added}
    assert kept == pytest.approx(wanted["metrics"], rel=1e-5)
    for seed, metrics in wanted["per_seed"].items():
        assert results["per_seed"][seed] == pytest.approx(metrics, rel=1e-5)
    for part in ("rows", "completions"):
        for got, row in zip(results[part], wanted[part], strict=True):
            assert [name for name in got if name != "bytes"] == list(row)
            for name, value in row.items():
                assert got[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)


# ---- The study ----


def test_the_report_of_the_committed_study_is_the_committed_one(tmp_path):
    shutil.copytree(STUDY / "results", tmp_path / "study")
    reports = ("comparison.json", "comparison.md")
    committed = {name: (tmp_path / "study" / name).read_text() for name in reports}
    for file in (tmp_path / "study").glob("comparison.*"):
        file.unlink()
    command = ["compare", str(STUDY / "study.yaml"), "--output-dir", str(tmp_path / "study"), "--report-only"]
    assert cli.main(command) == 0
    assert {name: (tmp_path / "study" / name).read_text() for name in reports} == committed
