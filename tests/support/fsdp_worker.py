"""One process of several under FSDP2 that also counts how often weights are gathered to write (see test_fsdp.py)."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from engine_worker import run, shard_on_cpus, stored_bytes
from torch.utils._python_dispatch import TorchDispatchMode

from amid_trl.sources import writers


class Gatherings(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types, args=(), kwargs=None):
        self.count += "allgather" in func.name()
        return func(*args, **(kwargs or {}))


def watch_writing() -> list[dict]:
    """For every window written from now on, how often weights were gathered.

    Also what the process holds of them afterwards, and how often a second forward pass gathers then.
    """
    seen, write = [], writers.writing

    def watched(model, *args, **kwargs):
        with Gatherings() as gatherings:
            completions = write(model, *args, **kwargs)
        held = stored_bytes(model)
        with torch.no_grad():
            model(torch.tensor([[1]]))
            with Gatherings() as again:
                model(torch.tensor([[1]]))
        seen.append({"gatherings": gatherings.count, "bytes": held, "again": again.count})
        return completions

    writers.writing = watched
    return seen


def main(models: Path, output_dir: Path, cases: dict[str, dict]) -> None:
    shard_on_cpus()
    written = watch_writing()
    rank = int(os.environ["RANK"])
    for name, settings in cases.items():
        split = {"fsdp": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        written.clear()
        result = {**run(models, output_dir / name, **split, **settings), "written": written}
        (output_dir / name / f"rank{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
