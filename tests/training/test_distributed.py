"""What two processes decide together and draw apart (DDP over gloo)."""

import json
import os
from pathlib import Path

import torch
from processes import run_ranks


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(directory: Path, processes: int, **settings) -> list[dict]:
    arguments = [str(directory), json.dumps(settings)]
    run_ranks("ddp_worker", *arguments, environment=ENVIRONMENT, processes=processes, timeout=240)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(processes)]


def figures(result: dict) -> list[tuple[float, ...]]:
    names = ("loss", "grad_norm", "kl", "objective", "student_entropy")
    return [tuple(entry[name] for name in names) for entry in result["log"] if "grad_norm" in entry]


def test_processes_share_decisions_and_counts_but_write_different_text(tmp_path):
    # One prompt for everybody: whoever shares a random state writes the same completion.
    settings = {"rows": 8, "one_prompt": True, "lmbda": 0.5, "max_steps": 6, "per_device_train_batch_size": 1}
    first, second = run(tmp_path, 2, **settings)
    sources = [[window["source"] for window in result["windows"]] for result in (first, second)]
    assert sources[0] == sources[1] and set(sources[0]) == {"dataset", "student"}
    for mine, theirs in zip(first["windows"], second["windows"], strict=True):
        assert mine["count"] == theirs["count"] == sum(map(len, mine["completions"] + theirs["completions"]))
        if mine["source"] == "student":
            assert mine["completions"] != theirs["completions"]


REPLAYING = {
    "rows": 8,
    "sampling": "adaptive",
    "adaptive_threshold": 0.8,
    "replay_capacity": 4,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "per_device_train_batch_size": 2,
    "max_steps": 10,
    "save_strategy": "steps",
    "save_steps": 6,
}


def rows(replay: dict) -> list[tuple[int, ...]]:
    """Tokens of every row in the state of a replay buffer, the newest last."""
    ids = iter(replay["ids"])
    return [tuple(next(ids) for _ in range(prompt + completion)) for prompt, completion in replay["lengths"]]


def test_processes_replay_rows_of_their_own_and_a_resumed_run_repeats_them(tmp_path):
    whole = run(tmp_path / "whole", 2, **REPLAYING)
    sources = [[window["source"] for window in result["windows"]] for result in whole]
    assert sources[0] == sources[1] and "replay" in sources[0][6:]
    assert not set(rows(whole[0]["replay"])) & set(rows(whole[1]["replay"]))
    checkpoint = str(tmp_path / "whole" / "checkpoint-6")
    resumed = run(tmp_path / "resumed", 2, **REPLAYING, resumed_from=checkpoint)
    for mine, theirs in zip(resumed, whole, strict=True):
        assert mine["windows"] == theirs["windows"][6:]
        assert figures(mine) == figures(theirs)

    # A single process takes over the rows of both.
    [one] = run(
        tmp_path / "one",
        1,
        **{**REPLAYING, "replay_capacity": 8, "gradient_accumulation_steps": 2},
        resumed_from=checkpoint,
    )
    assert [window["source"] for window in one["windows"]] == sources[0][6:]
    saved = [torch.load(f"{checkpoint}/distillation_state_{rank}.pt", weights_only=True)["replay"] for rank in (0, 1)]
    earlier = {row for state in saved for row in rows({name: part.tolist() for name, part in state.items()})}
    replayed = [text for window in one["windows"] if window["source"] == "replay" for text in window["completions"]]
    assert replayed and all(any(list(row[-len(text) :]) == text for row in earlier) for text in replayed)
