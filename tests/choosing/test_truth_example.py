"""Whether the landscape's ranking is that of trained runs: what lies under examples/truth is what the pages say."""

import json
import re
from pathlib import Path

import pytest
import yaml

from amid_trl.comparison.spec import read_comparison


ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "truth"
STORED = sorted(file.parent.name for file in EXAMPLE.glob("results/*/truth.json"))


def spec(pair: str) -> dict:
    return yaml.safe_load((EXAMPLE / f"compare-{pair}.yaml").read_text())


def test_both_pairs_do_the_same_work_on_another_student():
    one, other = spec("24-layers"), spec("18-layers")
    assert one["base"].pop("model_name_or_path") != other["base"].pop("model_name_or_path")
    assert one == other
    for file in EXAMPLE.glob("compare-*.yaml"):
        assert len(read_comparison(file).seeded_runs) == 18


@pytest.mark.parametrize("pair", STORED)
def test_the_stored_correlations_are_those_of_the_stored_numbers(pair, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from landscape_truth import agreement

    folder, content = EXAMPLE / "results" / pair, spec(pair)
    landscape, results, truth = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("landscape", "comparison", "truth")
    )
    configs = {name: {**content["base"], **settings} for name, settings in content["runs"].items()}
    for by, stored in truth.items():
        found = agreement(landscape, configs, results, by)
        assert found["runs"] == stored["runs"] == list(content["runs"])
        assert found["predicted"] == pytest.approx(stored["predicted"])
        for metric, correlations in found["metrics"].items():
            for name, numbers in correlations.items():
                assert numbers == pytest.approx(stored["metrics"][metric][name]), (by, metric, name)
    assert results["seeds"] == content["seeds"] and results["missing"] == []


@pytest.mark.parametrize("pair", STORED)
def test_the_pages_say_what_was_found(pair):
    truth = json.loads((EXAMPLE / "results" / pair / "truth.json").read_text())
    rows = [
        f"| {pair.replace('-', ' ')} | {by} | "
        + " | ".join(
            "{value:.2f} ({low:.2f} to {high:.2f})".format(**found["metrics"][metric]["spearman"])
            for metric in ("eval_kl", "eval_nll", "eval_top1_agreement")
        )
        + " |"
        for by, found in truth.items()
    ]
    for page in (ROOT / "docs" / "choosing.md", EXAMPLE / "README.md"):
        shown = re.sub(r"`", "", page.read_text())
        for row in rows:
            assert row in shown, page
