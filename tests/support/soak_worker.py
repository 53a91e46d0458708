"""A run of tests/support/soak.py in a process of its own, to be killed: python soak_worker.py OUTPUT_DIR SETTINGS."""

import hashlib
import json
import os
import sys
from pathlib import Path

import psutil
import survival_worker
from transformers import TrainerCallback

from amid_trl.training.checkpoints import is_complete


# Of what is logged, what is no time.
FIGURES = ("loss", "grad_norm", "learning_rate", "kl", "objective", "on_policy_share", "replay_share", "eval_nll")


class Trace(TrainerCallback):
    """Keeps what is logged, the hash of what is saved and the memory in files that outlive the process."""

    def __init__(self):
        self._parent = os.getppid()

    def on_log(self, args, state, control, logs, **kwargs):
        figures = {name: logs[name] for name in FIGURES if name in logs}
        if figures:  # not in the summary at the end
            _append(args.output_dir, "logged", [state.global_step, figures])

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        _append(args.output_dir, "saved", [state.global_step, weights_hash(checkpoint)])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 10 == 0:
            _append(args.output_dir, "memory", [state.global_step, psutil.Process().memory_info().rss / 1e6])
        if os.getppid() != self._parent:
            os._exit(1)  # nobody is there to kill it


def _append(folder: str, name: str, line: list) -> None:
    with Path(folder, name).open("a") as file:  # one write, which no kill cuts in two
        file.write(json.dumps(line) + "\n")


def weights_hash(folder: Path) -> str:
    [weights] = folder.glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def has_checkpoint(folder: Path) -> bool:
    return any(is_complete(checkpoint) for checkpoint in folder.glob("checkpoint-*"))


if __name__ == "__main__":
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    survival_worker.run(str(folder), has_checkpoint(folder), callbacks=[Trace()], **settings).save_model()
