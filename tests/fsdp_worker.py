"""What zero_worker trains, under FSDP2; as a script, one process of it (see test_fsdp.py)."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.utils._python_dispatch import TorchDispatchMode
from zero_worker import run, stored_share

from amid_trl import writers


def shard_on_cpus() -> None:
    """Have accelerate's state say on CPUs, too, that FSDP was asked for; by itself it falls back to data parallelism.

    What then runs is accelerate's, transformers' and torch's own.
    """
    init = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = with_fsdp


class Gatherings(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types, args=(), kwargs=None):
        self.count += "allgather" in func.name()
        return func(*args, **(kwargs or {}))


def watch_writing() -> list[dict]:
    """For every window written from now on: how often weights were gathered, and what the process holds afterwards."""
    seen, write = [], writers.writing

    def watched(model, *args, **kwargs):
        with Gatherings() as gatherings:
            completions = write(model, *args, **kwargs)
        seen.append({"gatherings": gatherings.count, "share": stored_share(model)})
        return completions

    writers.writing = watched
    return seen


def main(models: Path, output_dir: Path, cases: dict[str, dict]) -> None:
    shard_on_cpus()
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # as accelerate's launcher does
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
