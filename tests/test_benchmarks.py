"""The benchmarks measure what they say: real runs at tiny sizes, memory of a known size, invented records."""

import copy
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import messages_dataset, save_tiny, tiny_llama, tiny_tokenizer

from amid_trl.maths.kernel import COMPILE_FROM_VOCAB


ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SIZE = {"tokens": 8, "vocabulary": 64}


@pytest.fixture
def linear_loss(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import linear_loss

    return linear_loss


@pytest.fixture
def engine_memory(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import engine_memory

    return engine_memory


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import measure

    return measure


def test_the_script_measures_and_writes_its_three_files(tmp_path):
    methods = ("products", "dense_gkd", "gkd", "gkd_frozen", "amid_kl")
    settings = ("--repeats", "2", "--threads", "1", "--output", tmp_path)
    subprocess.run(
        [sys.executable, BENCHMARKS / "linear_loss.py", "--tiny", "--methods", *methods, *settings],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert {path.name for path in tmp_path.iterdir()} == {"linear_loss.md", "linear_loss.json", "linear_loss.png"}
    records = json.loads((tmp_path / "linear_loss.json").read_text())["records"]
    assert [record["method"] for record in records] == list(methods)
    for record in records:
        assert len(record["all_seconds"]) == 2
        assert record["seconds"] > 0
    products, dense, ours, frozen, _ = (record["values"] for record in records)
    assert not products
    assert ours.keys() == dense.keys() == {"loss", "hidden_gradient", "weight_gradient"}
    assert frozen.keys() == {"loss", "hidden_gradient"}
    report = (tmp_path / "linear_loss.md").read_text()
    assert "| ours, JSD: time / four matrix products | 1.05 |" in report
    assert (tmp_path / "linear_loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_moves_is_measured_beside_what_is_fixed(tmp_path):
    sizes = ("--tokens", "8", "--vocabulary", "64", "--repeats", "2", "--output", tmp_path)
    subprocess.run(
        [sys.executable, BENCHMARKS / "moving_objectives.py", *sizes], check=True, stdout=subprocess.DEVNULL
    )
    results = json.loads((tmp_path / "moving_objectives.json").read_text())
    report = (tmp_path / "moving_objectives.md").read_text()
    for record in results["records"]:
        counts = {way: len(seconds) for way, seconds in record["all_seconds"].items()}
        assert counts == {"fixed": 2, "moving": 2, "moving, not compiled": 1}
        assert record["ratio"] > 0 and f"| {record['case']} |" in report
        assert record["compilations"] == 0  # so small a vocabulary is not compiled


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

    about = {"date": "", "command": "", "revision": "", "device": "cpu", "cpu": "", "threads": 1, "cores": 1}
    about |= {"logical_cpus": 1, "ram_gb": 1, "versions": {}}
    runs = [
        {"way": way, "again": again, "prepared": 2.0, "steps": [9.0, 5.0, 3.0, 4.0, 5.0], "seconds": 28.0}
        for way, again in first_minute.RUNS
    ]
    line = {"line": "begins", "seconds": 1.0, "processor_seconds": 0.5}
    imports = {"SFTTrainer": [4.0, 5.0, 4.5], "AMiDTrainer": [4.5, 4.0, 5.4]}
    results = {"imports": imports, "first_line": line, "runs": runs, "steps": 5, "rows": 8, "about": about}
    text = first_minute.report(results)
    assert "The ratio of the medians is 1.00" in text and "says “begins” after 1.0 s" in text
    assert "| compiled ahead, second start | 2.0 | 9.0 | 5.0 | 4.0 | 2.25 | 28 |" in text


def test_what_reads_the_cache_trains_as_the_teacher_says_and_without_it(monkeypatch, tmp_path, tokenizer, teacher):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import cached_teacher
    import trainer_step

    monkeypatch.setattr(trainer_step, "load_teacher", lambda models: (copy.deepcopy(teacher), tokenizer))
    monkeypatch.setattr(trainer_step, "conversations", lambda tokenizer, count: messages_dataset(count))
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


def test_the_peak_counts_memory_that_is_freed_before_the_call_ends(measure):
    mebibytes = 2**20 / measure.MB
    torch.ones(64, 2**20)  # an earlier, higher peak
    added = [measure.cost(lambda: torch.ones(16, 2**20), "cpu").added_mb for _ in range(2)]
    assert added == pytest.approx([64 * mebibytes] * 2, abs=4)


def test_matrix_products_are_those_of_a_head_and_its_gradient(linear_loss, monkeypatch):
    import linear_methods

    monkeypatch.setattr(linear_methods, "PRODUCT_SLICE", 24)  # 64 entries: the last slice is shorter
    inputs = linear_methods.Inputs.random(8, 64, "float32", "cpu", frozen_head=False)
    linear_methods.METHODS["products"].load()(inputs)
    hidden, weight = inputs.student_hidden.detach(), inputs.student_weight.detach()
    logits = hidden @ weight.T
    torch.testing.assert_close(inputs.student_hidden.grad, logits @ weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inputs.student_weight.grad, logits.T @ hidden, rtol=1e-4, atol=1e-4)


def test_methods_that_disagree_are_refused(linear_loss):
    def records(**changed):
        agreed = {"loss": 0.5, "hidden_gradient": 0.1, "weight_gradient": 0.2}
        return [
            {"method": "trl_dense", **SIZE, "values": agreed},
            {"method": "kd", **SIZE, "values": {"loss": 7.0}},  # another objective
            {"method": "gkd_frozen", **SIZE, "values": {"loss": 0.5, "hidden_gradient": 0.1}},
            {"method": "gkd", **SIZE, "values": agreed | changed},
        ]

    linear_loss.check_values(records(loss=0.50004), 1e-4)
    for changed in ({"loss": 0.5001}, {"hidden_gradient": 0.11}, {"weight_gradient": 0.0}, {"loss": float("nan")}):
        with pytest.raises(RuntimeError, match="of gkd is"):
            linear_loss.check_values(records(**changed), 1e-4)


def test_after_a_disagreement_nothing_is_written(linear_loss, monkeypatch, tmp_path):
    disagreeing = [{"method": name, **SIZE, "values": {"loss": loss}} for name, loss in (("gkd", 1.0), ("liger", 2.0))]
    monkeypatch.setattr(linear_loss, "measure_all", lambda args: disagreeing)
    with pytest.raises(RuntimeError, match="loss of liger is"):
        linear_loss.main(["--methods", "gkd", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_target_counts_the_worst_of_ours(linear_loss):
    def record(method, seconds, megabytes):
        return {"method": method, **SIZE, "seconds": seconds, "added_mb": megabytes}

    records = [
        record("products", 1.0, 10.0),
        record("trl_chunked", 10.0, 100.0),
        record("gkd", 1.2, 12.0),
        record("amid", 1.3, 11.0),
        record("amid_kl", 1.4, 11.5),
        {"method": "liger", **SIZE, "failure": "out of memory"},
    ]
    rows = [(row["what"], row["at_most"], row["measured"]) for row in linear_loss.targets(records, linear_loss.TINY)]
    assert rows == [
        ("ours, AMiD's KL(p‖r), α = -5: time / four matrix products", 1.2, 1.4),
        ("ours, JSD: time / four matrix products", 1.05, 1.2),
        ("ours, JSD: time / TRL DistillationTrainer, chunked JSD", 0.35, 0.12),
        ("ours, JSD: memory / TRL DistillationTrainer, chunked JSD", 0.12, 0.12),
    ]


def test_growth_is_counted_in_hidden_states_of_both_models(linear_loss):
    state = 4 * (576 + 960) / 1e6  # float32, in MB
    records = [
        {"method": "gkd", "tokens": tokens, "vocabulary": 49152, "added_mb": 100 + 3 * state * tokens}
        for tokens in (1024, 4096)
    ]
    (row,) = linear_loss.growth(records, linear_loss.FULL, "float32")
    assert row["measured"] == pytest.approx(3)


def test_what_cannot_fit_is_reported_and_not_run(linear_loss, monkeypatch):
    args = linear_loss.parse(["--methods", "dense_gkd"])
    records = [{"method": "dense_gkd", "tokens": 512, "vocabulary": 49152, "added_mb": 2000.0}]
    monkeypatch.setattr(linear_loss, "free_mb", lambda device: 16_000.0)
    monkeypatch.setattr(linear_loss, "in_new_process", lambda *args: {"added_mb": 1.0})
    # Eight times the logits, and 327 MB of inputs: 4096 tokens and 49152 entries of 576 + 960 numbers each.
    refused = linear_loss.measured_or_refused("dense_gkd", (4096, 49152), records, args)
    assert refused["failure"] == "out of memory (needs about 16 GB)"
    assert "failure" not in linear_loss.measured_or_refused("dense_gkd", (2048, 49152), records, args)


def test_the_process_that_holds_most_stands_for_its_engine(engine_memory):
    def rank(megabytes):
        size = megabytes * 10**6
        others = {"libraries": 5 * 10**6, "resident": 7 * size, "peak": 8 * size}
        counted = engine_memory.COUNTED
        return dict.fromkeys(counted, size) | others | {"said": dict.fromkeys(counted, 2 * size)}

    about = {"date": "", "command": "", "revision": "", "device": "cpu", "cpu": "", "threads": 1, "cores": 1}
    about |= {"logical_cpus": 1, "ram_gb": 1, "versions": {}}
    text = engine_memory.report({"about": about, "records": [{"engine": "zero1", "ranks": [rank(12), rank(10)]}]})
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
