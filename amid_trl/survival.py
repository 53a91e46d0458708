"""What lets a run survive: checkpoints that are whole or known not to be, and a way out on SIGTERM."""

import json
import logging
import re
import shutil
import signal
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.serialization import safe_globals
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints


logger = logging.getLogger(__name__)

# There for as long as any process writes into a checkpoint; transformers' own name for it.
UNFINISHED = "checkpoint-is-incomplete.txt"
TRAINER_STATE = "trainer_state.json"  # written last
CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
ENGINE_FOLDER = re.compile(r"global_step\d+")  # DeepSpeed's, within a checkpoint

# What a shell reports of a process that SIGTERM has ended.
TERMINATED = 128 + signal.SIGTERM


@contextmanager
def whole_checkpoint(
    run_dir: str, args: TrainingArguments, state: TrainerState, accelerator: Accelerator
) -> Iterator[str]:
    """Mark this step's checkpoint as unfinished until all processes have left the block; for ever, if one does not.

    Only then are older ones deleted, those beyond `save_total_limit`.
    """
    mark = Path(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", UNFINISHED)
    if accelerator.is_main_process:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    accelerator.wait_for_everyone()
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield str(mark.parent)
    finally:
        args.save_total_limit = limit
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        mark.unlink()
        rotate_checkpoints(run_dir, limit, state.best_model_checkpoint, use_mtime=True)
    accelerator.wait_for_everyone()  # after SIGTERM all leave next, and the launcher ends the others with the first


def checkpoint_to_resume(asked: str | bool | None, output_dir: str, accelerator: Accelerator) -> str | bool | None:
    """What is asked for, its files checked; for True the last whole checkpoint. All processes have to ask.

    Where there is none True stays, of which transformers complains.
    """
    checkpoint = (last_complete_checkpoint(output_dir, accelerator) or True) if asked is True else asked
    if isinstance(checkpoint, str):
        if Path(checkpoint, UNFINISHED).exists():
            raise ValueError(f"{checkpoint} was being written when its run ended; resume from an earlier checkpoint")
        check_files(checkpoint)
    return checkpoint


def last_complete_checkpoint(output_dir: str, accelerator: Accelerator) -> str | None:
    """The newest whole checkpoint; newer ones that are not are set aside with a warning. All processes have to ask."""
    newest_first = sorted(_checkpoints(Path(output_dir)), key=_step, reverse=True)
    torn = list(takewhile(lambda folder: not is_complete(folder), newest_first))
    accelerator.wait_for_everyone()  # all have looked before anything is renamed
    if accelerator.is_main_process and torn:
        for earlier in Path(output_dir).glob(f"torn-{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(earlier, ignore_errors=True)  # kill after kill would fill the disk
        for folder in torn:
            aside = folder.with_name(f"torn-{folder.name}")  # not a name that transformers looks for
            folder.rename(aside)
            logger.warning("%s was being written when its run ended; it is set aside as %s", folder, aside.name)
    return next((str(folder) for folder in newest_first if folder not in torn), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether the file that is written last is there, and nobody was writing any more."""
    return (checkpoint / TRAINER_STATE).exists() and not (checkpoint / UNFINISHED).exists()


def last_finite_checkpoint(output_dir: str) -> str | None:
    """The newest whole checkpoint without a NaN or an infinite weight."""
    newest_first = sorted(_checkpoints(Path(output_dir)), key=_step, reverse=True)
    return next((str(folder) for folder in newest_first if is_complete(folder) and _is_finite(folder)), None)


def _is_finite(checkpoint: Path) -> bool:
    files = list(checkpoint.rglob("*.safetensors"))  # an adapter with a name of its own has a folder
    return bool(files) and all(bool(weight.isfinite().all()) for file in files for weight in load_file(file).values())


def _checkpoints(output_dir: Path) -> list[Path]:
    return [path for path in output_dir.glob("*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def check_files(checkpoint: str) -> None:
    """Refuse a checkpoint with a file that cannot be read: a ValueError that names it."""
    for file in sorted(Path(checkpoint).rglob("*")):
        try:
            _check(file)
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile, UnpicklingError) as error:
            raise ValueError(f"{file} is damaged ({error}); resume from an earlier checkpoint") from error


def _check(file: Path) -> None:
    if file.suffix == ".safetensors":
        safe_open(file, framework="pt").keys()
    elif file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))
    elif file.suffix in (".pt", ".pth", ".bin"):  # torch writes zip archives, with check sums
        with zipfile.ZipFile(file) as archive:
            if (entry := archive.testzip()) is not None:
                raise ValueError(f"its entry {entry} is not what was written")
        if ENGINE_FOLDER.fullmatch(file.parent.name):
            _check_engine_state(file)


def _check_engine_state(file: Path) -> None:
    # DeepSpeed loads whatever objects the file asks for. Nothing is read here but what says which these are.
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        torch.load(file, map_location="cpu", mmap=True, weights_only=True)


class StopOnSigterm(TrainerCallback):
    """After SIGTERM on any process all of them finish the step, save a checkpoint and leave.

    A context manager around the training. It listens in the main thread alone: no other one gets signals.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._asked = self._stopped = False

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask)

    def __exit__(self, *exception: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)

    def _ask(self, signum: int, frame: object) -> None:
        self._asked = True

    def on_step_end(self, args, state, control, **kwargs):
        """Agree, and stop."""
        asked: Any = torch.tensor(float(self._asked), device=self._accelerator.device)
        if self._accelerator.num_processes > 1:
            asked = self._accelerator.reduce(asked)
        if asked.item():
            control.should_save = control.should_training_stop = self._stopped = True

    def on_epoch_end(self, args, state, control, **kwargs):
        """Save now if an evaluation at this step has found it not to be the best; the epoch is not over."""
        if self._stopped:
            control.should_evaluate, control.should_save = False, True

    def on_save(self, args, state, control, **kwargs):
        """Leave with this checkpoint, which the end of a run might delete for a better one."""
        if self._stopped:
            logger.warning("SIGTERM: training has stopped, and the last step has a checkpoint to resume from")
            raise SystemExit(TERMINATED)
