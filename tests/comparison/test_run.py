"""One run of a comparison: it stops when its budget is spent, scores every row, and survives what runs survive."""

import fcntl
import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from compared import comparison
from small_tokenizers import special_first
from tiny import messages_dataset, save_tiny, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.comparison import run as compared_run
from amid_trl.comparison.results import read_result
from amid_trl.evaluation.metrics import TRAINING_METRICS
from amid_trl.launch import script as train


ROWS = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_dir) -> dict:
    tokenizer = tiny_tokenizer()
    teacher = save_tiny(tmp_path_factory.mktemp("teacher") / "model", tiny_llama(tokenizer, seed=1), tokenizer)
    data = tmp_path_factory.mktemp("data")
    messages_dataset(8).to_json(data / "train.jsonl")
    messages_dataset(ROWS).to_json(data / "test.jsonl")
    return {
        "model_name_or_path": str(tiny_dir),
        "teacher_model_name_or_path": str(teacher),
        "dataset_name": str(data),
        "use_cpu": True,
        "bf16": False,
        "lmbda": 0.0,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "max_new_tokens": 4,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


@pytest.fixture
def run(tmp_path, base, monkeypatch):
    """Train in this process, as under a launcher; the result."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")

    def train_in(folder="run", budget=None, evaluates=True, **config) -> dict:
        budget = budget or {"steps": 3}
        folder = tmp_path / folder
        folder.mkdir(exist_ok=True)
        config = {**base, "seed": 0, "max_steps": budget.get("steps", 20), **config}
        settings = {"config": config, "budget": budget, "evaluates": evaluates}
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "run.yaml").write_text(yaml.safe_dump({**config, "output_dir": str(folder)}))
        train.run(["--config", str(folder / "run.yaml")], compared_run.main)
        return json.loads((folder / "result.json").read_text())

    return train_in


def test_the_result_says_what_was_done_and_with_what(run):
    result = run()
    assert result["settings"]["budget"] == {"steps": 3} and result["num_processes"] == 1
    assert set(result["metrics"]) == set(TRAINING_METRICS)
    assert result["work"]["steps"] == 3 and result["work"]["tokens"] > 0
    assert {"torch", "trl"} <= set(result["versions"])


def test_rows_add_up_to_the_metrics_and_are_those_of_the_saved_student(run, base, tmp_path):
    result = run()
    rows = result["rows"]
    for name, metric in result["metrics"].items():
        assert sum(rows["sums"][name]) / sum(rows["tokens"]) == pytest.approx(metric, rel=1e-5)

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    alone = []
    for i in range(ROWS):
        trainer = AMiDTrainer(
            student,
            base["teacher_model_name_or_path"],
            AMiDConfig(str(tmp_path / "one"), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=messages_dataset(1),
            eval_dataset=messages_dataset(ROWS).select([i]),
            processing_class=AutoTokenizer.from_pretrained(tmp_path / "run"),
        )
        alone.append(trainer.evaluate()["eval_kl"])
    means = [total / tokens for total, tokens in zip(rows["sums"]["eval_kl"], rows["tokens"], strict=True)]
    assert sorted(means) == pytest.approx(sorted(alone), rel=1e-4)


def test_what_the_means_of_a_teacher_with_another_tokenizer_are_over_is_kept(run, tmp_path):
    """It reads the beginning of a row alone, so that its figures are means over some of the trained tokens."""
    other = special_first()
    teacher = tiny_llama(other, seed=1, max_position_embeddings=24)
    found = run(teacher_model_name_or_path=str(save_tiny(tmp_path / "other", teacher, other)))
    asked = comparison("run", metrics=TRAINING_METRICS)
    read = read_result(asked, tmp_path / "run")
    for name, metric in found["metrics"].items():
        sums, weights = read.rows[name]
        assert sum(sums) / sum(weights) == pytest.approx(metric, rel=1e-5), name
        of_all = sum(weights) == sum(found["rows"]["tokens"])
        assert of_all if name == "eval_nll" else sum(weights) < sum(found["rows"]["tokens"])


def test_a_result_without_weights_is_read_as_means_over_tokens(run, tmp_path):
    """As an earlier version has written it."""
    found = run()
    file, asked = tmp_path / "run" / "result.json", comparison("run", metrics=TRAINING_METRICS)
    read = read_result(asked, file.parent)
    assert found["rows"].pop("weights") == {}
    file.write_text(json.dumps(found))
    assert read_result(asked, file.parent) == read
    assert read.rows["eval_kl"].weights == found["rows"]["tokens"]


def test_rows_have_their_places_in_whatever_order_they_are_evaluated(run):
    one, other = run("one"), run("other", shuffle_dataset=True, seed=1)
    assert one["rows"]["hash"] == other["rows"]["hash"]
    assert one["rows"]["tokens"] == other["rows"]["tokens"]


@pytest.fixture
def with_two_answers(base, tmp_path) -> str:
    """A dataset whose first question is answered once more."""
    rows = [row["messages"] for row in messages_dataset(ROWS)]
    rows.append([rows[0][0], {"role": "assistant", "content": "Another answer, and a longer one."}])
    folder = tmp_path / "data"
    folder.mkdir()
    messages_dataset(8).to_json(folder / "train.jsonl")
    (folder / "test.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    return str(folder)


def test_answers_to_one_prompt_are_one_row_in_whatever_order_training_takes_its_rows(run, with_two_answers):
    """The order by length is drawn with the training seed, in blocks of many batches."""
    settings = {"dataset_name": with_two_answers, "per_device_eval_batch_size": 2, "learning_rate": 0.0}
    plain = run("plain", **settings)
    rows, tokens = plain["rows"], plain["rows"]["tokens"]
    assert len(tokens) == ROWS
    assert sum(rows["sums"]["eval_kl"]) / sum(tokens) == pytest.approx(plain["metrics"]["eval_kl"], rel=1e-5)
    grouped = run("grouped", **settings, train_sampling_strategy="group_by_length", seed=1)["rows"]
    assert grouped["tokens"] == tokens and grouped["hash"] == rows["hash"]
    assert grouped["sums"]["eval_kl"] == pytest.approx(rows["sums"]["eval_kl"], rel=1e-5)


def test_the_result_knows_the_training_data(run, base, with_two_answers):
    """Its rows as they are stored: other lengths are not other data, and another order is."""
    rows = run("rows")["trained_rows"]
    assert rows == run("short", max_length=24, seed=1)["trained_rows"]
    data = Path(with_two_answers, "train.jsonl")
    assert rows == run("copied", dataset_name=with_two_answers)["trained_rows"]
    data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    assert rows != run("reversed", dataset_name=with_two_answers)["trained_rows"]


def test_a_stream_is_not_read_for_its_hash(run):
    assert run(dataset_streaming=True)["trained_rows"] is None


def test_without_a_metric_of_it_nothing_is_evaluated(run):
    result = run(evaluates=False)
    assert result["metrics"] == {} and result["rows"] is None


# ---- Budgets ----


def test_a_run_ends_with_the_step_that_spends_its_tokens(run):
    by_step = [run(f"{steps}-steps", {"steps": steps}, max_steps=steps)["work"]["tokens"] for steps in (1, 2, 3)]
    result = run("tokens", {"tokens": by_step[1] + 1})
    assert (result["work"]["steps"], result["work"]["tokens"]) == (3, by_step[2])
    assert run("exactly", {"tokens": by_step[1]})["work"]["steps"] == 2


@pytest.fixture
def clock(monkeypatch):
    """A step takes 15 s of this clock, which is `clock[0]`, an evaluation and a checkpoint an hour each."""
    now = [0.0]
    trained, evaluated, saved = AMiDTrainer.training_step, AMiDTrainer.evaluation_loop, AMiDTrainer._save_checkpoint

    def step(self, *args, **kwargs):
        now[0] += 15
        return trained(self, *args, **kwargs)

    def evaluation(self, *args, **kwargs):
        now[0] += 3600
        return evaluated(self, *args, **kwargs)

    def save(self, *args, **kwargs):
        now[0] += 3600
        return saved(self, *args, **kwargs)

    # Of the module alone: other threads of the tests read the clock.
    monkeypatch.setattr(compared_run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(AMiDTrainer, "training_step", step)
    monkeypatch.setattr(AMiDTrainer, "evaluation_loop", evaluation)
    monkeypatch.setattr(AMiDTrainer, "_save_checkpoint", save)
    return now


def test_minutes_are_those_of_training(run, clock):
    result = run(budget={"minutes": 1}, eval_strategy="steps", eval_steps=1)
    assert result["work"] == {"steps": 4, "tokens": result["work"]["tokens"], "minutes": 1.0}


def test_a_resumed_run_has_used_the_minutes_of_its_checkpoint(run, clock, tmp_path):
    settings = {"budget": {"minutes": 1}, "save_strategy": "steps", "save_steps": 1}
    whole = run(**settings)
    (tmp_path / "run" / "result.json").unlink()
    for later in (3, 4):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{later}")
    again = run(**settings)
    assert again["work"] == whole["work"] and again["metrics"] == whole["metrics"]


def test_processes_agree_on_the_mean_of_their_seconds(clock):
    def reduce(own, reduction):
        return {"mean": own, "sum": 2 * own}[reduction]

    accelerator = SimpleNamespace(device="cpu", num_processes=2, reduce=reduce)
    budget, state, control = compared_run.Budget("minutes", 1, accelerator), TrainerState(), TrainerControl()
    budget.on_train_begin(None, state, control)
    clock[0] += 45
    budget.on_step_end(None, state, control)
    assert budget.spent(state) == 0.75 and not control.should_training_stop


def test_a_run_that_ends_before_its_budget_is_no_result(run, tmp_path):
    with pytest.raises(ValueError, match="the run ended after 2 of 3 steps: raise max_steps"):
        run(budget={"steps": 3}, max_steps=2)
    assert not (tmp_path / "run" / "result.json").exists()


# ---- Runs that are killed ----


def test_a_killed_run_comes_to_the_same_result(run, tmp_path):
    unharmed = run("unharmed")
    settings = {"save_strategy": "steps", "save_steps": 1}
    run(**settings)
    (tmp_path / "run" / "result.json").unlink()
    for later in (2, 3):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{later}")
    killed = run(**settings)
    assert killed["metrics"] == unharmed["metrics"] and killed["rows"] == unharmed["rows"]
    assert {**killed["work"], "minutes": 0} == {**unharmed["work"], "minutes": 0}


@pytest.mark.parametrize("unit", ["steps", "tokens", "minutes"])
def test_a_run_killed_before_its_result_was_written_is_only_evaluated(run, clock, tmp_path, monkeypatch, unit):
    """Its fifth step is the first one of the second epoch."""
    amount = {"steps": 5, "minutes": 1.25, "tokens": run("five", {"steps": 5})["work"]["tokens"]}[unit]
    settings = {"budget": {unit: amount}, "save_strategy": "steps", "save_steps": 1}
    whole = run(**settings)
    assert whole["work"]["steps"] == 5
    (tmp_path / "run" / "result.json").unlink()
    monkeypatch.setattr(AMiDTrainer, "training_step", lambda *args, **kwargs: pytest.fail("a step more"))
    again = run(**settings)
    assert {**again, "date": ""} == {**whole, "date": ""}


def test_a_result_is_not_made_twice(run, tmp_path):
    run()
    before = (tmp_path / "run" / "result.json").stat()
    run()
    assert (tmp_path / "run" / "result.json").stat() == before


def test_a_folder_belongs_to_one_process_at_a_time(run, tmp_path, caplog):
    """A second process waits for the first; the result that it finds then is not made again."""
    folder = Path(tmp_path / "run")
    folder.mkdir()
    with open(folder / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def finish():
            time.sleep(1)
            (folder / "result.json").write_text('"theirs"')
            fcntl.flock(held, fcntl.LOCK_UN)

        first = threading.Thread(target=finish)
        first.start()
        assert run() == "theirs"
        first.join()
    assert "waiting for another process that works there" in caplog.text
