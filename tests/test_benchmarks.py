"""The benchmarks but those of the loss measure what they say: real runs at tiny sizes, invented records."""

import copy
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_tokenizers import TEXTS, byte_fallback, special_first
from tiny import messages_dataset, save_tiny, tiny_llama, tiny_tokenizer

from amid_trl.maths.kernel import COMPILE_FROM_VOCAB


ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
ABOUT = {"date": "", "command": "", "revision": "", "device": "cpu", "cpu": "", "threads": 1, "cores": 1}
ABOUT |= {"logical_cpus": 1, "ram_gb": 1, "versions": {}}


@pytest.fixture
def engine_memory(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import engine_memory

    return engine_memory


def test_without_a_gpu_its_benchmark_says_so_in_a_line(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "benchmarks/gpu.py: torch finds no CUDA device here\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_measured_on_a_gpu_runs_on_a_cpu_too(tmp_path):
    how = ("--device", "cpu", "--small", "--repeats", "2", "--output", tmp_path)
    subprocess.run([sys.executable, BENCHMARKS / "gpu.py", *how], check=True, stdout=subprocess.DEVNULL)
    results, text = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    methods = {record["method"] for record in results["losses"]}
    assert {"products", "gkd", "kd", "amid", "trl_chunked"} <= methods
    assert all(record["seconds"] > 0 and record["added_mb"] >= 0 for record in results["losses"])
    assert [record["way"] for record in results["padding"]] == ["padded", "padding_free"]
    assert [record["trainer"] for record in results["steps"]] == ["DistillationTrainer", "AMiDTrainer"]
    assert min(record["seconds"] for record in results["steps"]) > 0 < min(results["writing"].values())
    assert all(f"| {each['case']} |" in text for each in results["moving"])


@pytest.mark.gpu
def test_the_benchmark_of_a_gpu_runs_there(tmp_path):
    how = ("--small", "--repeats", "2", "--output", tmp_path)
    subprocess.run([sys.executable, BENCHMARKS / "gpu.py", *how], check=True, stdout=subprocess.DEVNULL)


def test_the_first_minute_is_told_as_it_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import first_minute

    runs = [
        {"way": way, "again": again, "prepared": 2.0, "steps": [9.0, 5.0, 3.0, 4.0, 5.0], "seconds": 28.0}
        for way, again in first_minute.RUNS
    ]
    line = {"line": "begins", "seconds": 1.0, "processor_seconds": 0.5}
    imports = {"SFTTrainer": [4.0, 5.0, 4.5], "AMiDTrainer": [4.5, 4.0, 5.4]}
    results = {"imports": imports, "first_line": line, "runs": runs, "steps": 5, "rows": 8, "about": ABOUT}
    text = first_minute.report(results)
    assert "The ratio of the medians is 1.00" in text and "says “begins” after 1.0 s" in text
    assert "| compiled ahead, second start | 2.0 | 9.0 | 5.0 | 4.0 | 2.25 | 28 |" in text


def test_a_floor_is_measured_on_what_the_step_was_made_of(monkeypatch, tmp_path, tokenizer, teacher):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step_floor
    import trainer_step

    monkeypatch.setattr(trainer_step, "load_teacher", lambda models: (copy.deepcopy(teacher), tokenizer))
    monkeypatch.setattr(trainer_step, "conversations", lambda tokenizer, count, long: messages_dataset(count))
    monkeypatch.setattr(trainer_step, "DROPPED_LAYERS", "1")
    made, build = [], step_floor.build
    monkeypatch.setattr(step_floor, "build", lambda *args, **more: made.append(build(*args, **more)) or made[-1])
    moving = next(name for name in step_floor.OBJECTIVES if "TAID" in name)
    record = step_floor.measure(moving, True, 2, tmp_path)
    assert len(record["all_steps"]) == len(record["all_floors"]) == 3
    assert record["parts"].keys() == {"teacher", "student", "products", "optimizer"}
    assert min(record["parts"].values()) > 0
    # Of each step, and the floor adds nothing to what is trained or counted.
    (trainer,) = made
    assert sum(record["tokens"]) == trainer.state.num_input_tokens_seen
    plain = build(
        trainer_step.OURS_DEFAULT, "off-policy", True, 3, tmp_path, tmp_path / "plain", **step_floor.OBJECTIVES[moving]
    )
    plain.train()
    ours, theirs = (dict(one.model.named_parameters()) for one in (trainer, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    text = step_floor.report(
        {"about": ABOUT, "at_most": 1.05, "records": [{"objective": moving, "checkpointing": True, **record}]}
    )
    assert f"| {moving}, with gradient checkpointing | " in text and f"| {record['ratio']:.2f} | 1.05 |" in text


def test_every_way_of_writing_writes_the_same(monkeypatch, tmp_path, tokenizer, teacher):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import writing

    monkeypatch.setattr(writing, "load_teacher", lambda models: (teacher, tokenizer))
    rows = [{"prompt": [{"role": "user", "content": "word " * count}]} for count in (1, 3, 2, 5)]
    monkeypatch.setattr(writing, "questions", lambda: SimpleNamespace(train=rows))
    monkeypatch.setattr(writing, "PIECE", 3)
    records = writing.measure(4, 8, 1, tmp_path, {"static cache, compiled"})
    ways = [writing.BARE, writing.OURS, writing.SEVERAL, writing.READ_ONCE, *writing.OTHERS]
    assert [record["way"] for record in records] == [way for way in ways if "compiled" not in way]
    assert all(record["equal"] == 1 and len(record["all_seconds"]) == 2 for record in records)
    assert len({record["tokens"] for record in records if record["beside"] == writing.BARE}) == 1
    text = writing.report({"about": ABOUT, "at_most": 1.05, "records": records})
    assert all(f"| {record['way']} | " in text for record in records)


def test_what_reads_the_cache_trains_as_the_teacher_says_and_without_it(monkeypatch, tmp_path, tokenizer, teacher):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import cached_teacher
    import trainer_step

    monkeypatch.setattr(trainer_step, "load_teacher", lambda models: (copy.deepcopy(teacher), tokenizer))
    monkeypatch.setattr(trainer_step, "conversations", lambda tokenizer, count, long: messages_dataset(count))
    monkeypatch.setattr(trainer_step, "DROPPED_LAYERS", "1")
    built, build = [], cached_teacher.build
    monkeypatch.setattr(cached_teacher, "build", lambda *args, **more: built.append(build(*args, **more)) or built[-1])
    runs = [
        cached_teacher.measure(True, 1, tmp_path, *where)
        for where in ((None,), (tmp_path / "cache", True), (tmp_path / "cache",))
    ]
    assert [trainer.teacher_model is not None for trainer in built] == [True, True, False]
    assert all(run["losses"] == pytest.approx(runs[0]["losses"], rel=1e-4) for run in runs)


def test_the_models_of_a_measured_step_have_a_loss_that_is_compiled(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import padding_free

    assert padding_free.FULL.vocabulary >= COMPILE_FROM_VOCAB


def test_the_process_that_holds_most_stands_for_its_engine(engine_memory):
    def rank(megabytes):
        size = megabytes * 10**6
        others = {"libraries": 5 * 10**6, "resident": 7 * size, "peak": 8 * size}
        counted = engine_memory.COUNTED
        return dict.fromkeys(counted, size) | others | {"said": dict.fromkeys(counted, 2 * size)}

    text = engine_memory.report({"about": ABOUT, "records": [{"engine": "zero1", "ranks": [rank(12), rank(10)]}]})
    assert "| zero1 | 12 (24) | 12 (24) | 12 (24) | 12 (24) | 48 (96) | 84 | 96 |" in text
    assert "all 3,000,000 weights" in text and "take up to 5." in text


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not all(map(find_spec, ("deepspeed", "chatterbot_corpus"))) or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="needs the extra `deepspeed`, a C++ compiler and the wheels of `make install`",
)
def test_every_engine_is_measured_in_processes_of_its_own(tmp_path):
    tokenizer = tiny_tokenizer()
    # So wide that DeepSpeed divides every matrix, the teacher's too.
    for name, mlp in (("student", 512), ("teacher", 768)):
        save_tiny(tmp_path / name, tiny_llama(tokenizer, hidden_size=512, intermediate_size=mlp), tokenizer)
    pair = ("--student", tmp_path / "student", "--teacher", tmp_path / "teacher")
    command = [sys.executable, BENCHMARKS / "engine_memory.py", *pair, "--output", tmp_path / "results"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=580)
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"engine_memory.md", "engine_memory.json"}
    records = json.loads((tmp_path / "results" / "engine_memory.json").read_text())["records"]
    ranks = {record["engine"]: record["ranks"] for record in records}
    processes = {engine: len(found) for engine, found in ranks.items()}
    assert processes == {"single": 1, **dict.fromkeys(("ddp", "zero1", "zero2", "zero3", "zero3, live 0", "fsdp2"), 2)}

    [one] = ranks["single"]
    trained = one["gradients"] // 4
    # Numbers of every trained weight that a process holds: of weights, gradients, moments with ZeRO's copy.
    shares = {"ddp": (1, 1, 2), "zero1": (1, 1, 3 / 2), "zero2": (1, 1 / 2, 3 / 2), "fsdp2": (1 / 2, 1 / 2, 1)}
    shares |= dict.fromkeys(("zero3", "zero3, live 0"), (1 / 2, 1 / 2, 3 / 2))
    for engine, (of_weights, of_gradients, of_optimizer) in shares.items():
        for rank in ranks[engine]:
            assert rank["student"] == pytest.approx(of_weights * one["student"], rel=0.02), engine
            assert rank["teacher"] == pytest.approx(of_weights * one["teacher"], rel=0.02), engine
            assert rank["optimizer"] == pytest.approx(4 * of_optimizer * trained, rel=0.02), engine
            # Under ZeRO-2 and 3 also what has not been handed on yet: a bucket, which takes one matrix.
            gradients = 4 * of_gradients * trained
            assert 0.99 * gradients <= rank["gradients"] <= gradients + 1.1 * 4 * 512 * 512, engine
            assert rank["said"]["gradients"] == pytest.approx(gradients), engine
            for name in ("student", "optimizer", "teacher"):
                assert rank["said"][name] == pytest.approx(rank[name], rel=0.02), (engine, name)
            assert rank["libraries"] < rank["resident"] <= rank["peak"]


def test_a_landscape_is_measured_beside_its_forward_passes(monkeypatch, tmp_path, train):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import landscape_cost

    monkeypatch.setattr(landscape_cost, "open_trainer", lambda *_: train())
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    threads = torch.get_num_threads()
    landscape_cost.main(["--rows", "4", "--repeats", "2", "--threads", "1", "--output", str(tmp_path)])
    torch.set_num_threads(threads)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    record = json.loads((tmp_path / "landscape_cost.json").read_text())
    assert record["settings"] == 100 and record["tokens"] == record["trained"] < record["seen"]
    assert len(record["all"]["passes"]) == len(record["all"]["landscape"]) == 2
    ratio = record["seconds"]["landscape"] / record["seconds"]["passes"]
    assert f"| {ratio:.2f} | {'met' if ratio <= 3 else 'missed'} |" in (tmp_path / "landscape_cost.md").read_text()


def test_the_landscapes_ranking_is_set_against_that_of_runs(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from landscape_truth import LAST, agreement

    def point(alpha, cosines, norm=1.0, order="pr"):
        names = ("divergence", "order", "alpha", "lam", "temperature", "gradient_norm", "participation")
        values = ("kl", order, alpha, None if alpha is None else 0.1, 1.0, norm, 1.0)
        return {**dict(zip(names, values, strict=True)), "cosine_forward": cosines[0], "cosine_reverse": cosines[1]}

    points = [
        point(-5.0, (0.2, 0.9)),
        point(0.5, (0.6, 0.7)),
        point(1.0, (0.9, 0.4)),
        point(3.0, (0.9, 0.9), norm=0.01),
    ]
    landscape = {"points": points, "forward_kl": point(None, (1.0, 0.3), order="pq")}
    alphas = {"a": -5.0, "b": 0.5, "c": 1.0, "d": 3.0, "elsewhere": 7.0}
    configs = {name: {"divergence": "kl", "assistant_alpha": alpha} for name, alpha in alphas.items()}
    configs["kd"] = {"objective": "kd"}
    figures = {"a": 1.5, "b": 1.0, "c": 1.2, "d": 1.1, "elsewhere": 0.0, "kd": 0.0}
    runs = {
        name: {"metrics": {"eval_kl": {"mean": x}, "eval_student_entropy": {"mean": x}}} for name, x in figures.items()
    }
    found = agreement(landscape, configs, {"runs": runs})
    assert found["runs"] == ["a", "b", "c", "d"] and found["predicted"] == [0.2, 0.6, 0.4, LAST]
    assert agreement(landscape, configs, {"runs": runs}, "cosine_forward")["predicted"] == [0.2, 0.6, 0.9, 0.9]
    assert list(found["metrics"]) == ["eval_kl"]  # nobody says which entropy is better
    # Ranks 2, 4, 3, 1 and 1, 4, 2, 3, less being better: 1 - 6 Σ d² / (n (n² - 1)), and 4 of 6 pairs agree.
    assert found["metrics"]["eval_kl"]["spearman"]["value"] == pytest.approx(1 - 6 * 6 / 60)
    assert found["metrics"]["eval_kl"]["kendall"]["value"] == pytest.approx((4 - 2) / 6)


@pytest.mark.slow
def test_rules_of_two_tokenizers_are_measured_beside_the_truth(tmp_path):
    """Where all of the teacher's tokens are whole ones of the student's, ours alone is without error."""
    command = [sys.executable, BENCHMARKS / "outcomes_bias.py", "--letters-alone", "--output", tmp_path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    first, *_ = json.loads((tmp_path / "outcomes_bias.json").read_text())["records"]
    assert first["rules"]["ours"]["nats"] < 1e-9 < 0.1 < first["rules"]["first token"]["nats"]
    assert first["rules"]["ours"]["degrees"] < first["rules"]["the same bytes"]["degrees"] / 2
    assert "| ours | 0.000 / " in (tmp_path / "outcomes_bias.md").read_text()


def test_a_pair_of_tokenizers_is_made_and_found_again(monkeypatch, tmp_path, caplog):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tokenizer_pairs

    for name in ("XDG_CACHE_HOME", "TOKENIZERS_PARALLELISM"):  # the benchmark sets them in a process of its own
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("amid_trl.models.kept_pairs.KEPT_FROM", 0)
    made = {"a": special_first(), "b": byte_fallback()}
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(tmp_path / name)
    first = tokenizer_pairs.measure(str(tmp_path), ("a", "b"))
    assert "Pairing the tokens" in caplog.text
    caplog.clear()
    later = tokenizer_pairs.measure(str(tmp_path), ("a", "b"))
    assert "Pairing the tokens" not in caplog.text
    assert first["tokens"] == later["tokens"] == [len(tokenizer) for tokenizer in made.values()]
    assert first["row_tokens"] == len(made["a"]("\n".join(tokenizer_pairs.COPIES * TEXTS))["input_ids"])
    record = {"pair": ("a", "b"), **later, "seconds": 1.0, "mb": 100, "first_seconds": 2.0, "first_mb": 200}
    text = tokenizer_pairs.report({"about": ABOUT, "records": [record]})
    assert f"| a ← b | {' and '.join(map(str, later['tokens']))} | 2.0 | 200 | 1.0 | 100 | " in text


def test_the_likelihood_of_chunks_is_that_of_their_tokens(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import chunk_likelihood

    boundaries, labels = {0: 0, 1: 1, 3: 2, 4: 4, 6: 4, 7: 6}, [-100, 5, 6, 7, 8, 9, 4]
    chunks = [*chunk_likelihood.chunks_of(labels, boundaries)]
    # The first is the prompt's; between 4 and 6 the teacher writes nothing.
    assert chunks == [(range(1, 3), range(1, 2)), (range(3, 4), range(2, 4)), (range(6, 7), range(4, 6))]
    torch.manual_seed(0)
    logits, ids = torch.randn(7, 11, dtype=torch.float64), [1, 5, 6, 7, 8, 9, 4]
    p = logits.softmax(-1)
    expected = torch.tensor([p[0, 5] * p[1, 6], p[2, 7], p[5, 4]])
    log_q = chunk_likelihood.chunk_log_probs(logits, ids, [chunk.student for chunk in chunks])
    torch.testing.assert_close(log_q.exp(), expected.float())
    other = torch.tensor([0.5, 0.25, 1.0])
    found = chunk_likelihood.two_way_kl(other.log(), log_q)
    of_two = other * (other / expected).log()
    of_two[:2] += (1 - other[:2]) * ((1 - other[:2]) / (1 - expected[:2])).log()
    torch.testing.assert_close(found, of_two.float())
