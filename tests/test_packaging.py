"""The extras can be installed beside the versions that the tests ran with."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest


ROOT = Path(__file__).parents[1]


def requirements(extra: str) -> list[str]:
    """What setup.py asks for, with an extra."""
    with patch("setuptools.setup") as setup, patch.object(sys, "argv", ["setup.py", "--version"]):
        runpy.run_path(str(ROOT / "setup.py"))
    given = setup.call_args.kwargs
    return [*given["install_requires"], *given["extras_require"][extra]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_resolves_with_the_pinned_versions_but_numpys(tmp_path):
    """As the README has it. Of vLLM's requirements the metadata alone is read; it needs the package index."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("numpy==")]
    (tmp_path / "with-vllm.txt").write_text("\n".join(pins))
    flags = ["--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--report", str(tmp_path / "report.json")]
    command = [sys.executable, "-m", "pip", "install", *flags, "-c", str(tmp_path / "with-vllm.txt")]
    done = subprocess.run([*command, *requirements("vllm")], capture_output=True, text=True)
    if "Failed to establish a new connection" in done.stderr or "No matching distribution found" in done.stderr:
        pytest.skip("no package index is reached")
    assert done.returncode == 0, done.stderr[-3000:]
    installed = json.loads((tmp_path / "report.json").read_text())["install"]
    versions = {each["metadata"]["name"].lower(): each["metadata"]["version"] for each in installed}
    assert "vllm" in versions
    for name in ("transformers", "trl", "peft", "accelerate", "datasets"):
        assert f"{name}=={versions[name]}" in pins
