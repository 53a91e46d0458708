"""The benchmarks of the loss: real runs at tiny sizes, memory of a known size, invented records."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZE = {"tokens": 8, "vocabulary": 64}


@pytest.fixture
def linear_loss(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import linear_loss

    return linear_loss


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
    at_size = [record for record in records if (record["tokens"], record["vocabulary"]) == (8, 64)]
    assert [record["method"] for record in at_size] == list(methods)
    for record in records:
        size = record["tokens"], record["vocabulary"]
        assert len(record["all_seconds"]) == (1 if size == (16, 128) else 2)
        assert record["seconds"] > 0
    products, dense, ours, frozen, _ = (record["values"] for record in at_size)
    assert not products
    assert ours.keys() == dense.keys() == {"loss", "hidden_gradient", "weight_gradient"}
    assert frozen.keys() == {"loss", "hidden_gradient"}
    report = (tmp_path / "linear_loss.md").read_text()
    assert "| ours, JSD, 8 × 64: time / four matrix products | 1.05 |" in report
    assert "| ours, AMiD's KL(p‖r), α = -5, 16 × 64: time / four matrix products | 1.20 |" in report
    assert "\n| 16 × 128 | " in report
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
        record("gkd_frozen", 1.5, 20.0),
    ]
    rows = [(row["what"], row["at_most"], row["measured"]) for row in linear_loss.targets(records, linear_loss.TINY)]
    assert rows == [
        ("ours, JSD, 8 × 64: time / four matrix products", 1.05, 1.2),
        ("ours, AMiD, 8 × 64: time / four matrix products", 1.2, 1.3),
        ("ours, AMiD's KL(p‖r), α = -5, 8 × 64: time / four matrix products", 1.2, 1.4),
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
