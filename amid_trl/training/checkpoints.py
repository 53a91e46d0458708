"""What lets a run survive: checkpoints that are whole or known not to be, and what they hold beside the weights.

Every process writes a file of its own, of numbers and tensors, which is loaded without pickle. A run without such
state writes none.
"""

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments

from amid_trl._trl import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from amid_trl.models.deepspeed import ENGINE_FOLDER, check_engine_file, newest_engine_folder, zero_stage
from amid_trl.run import Stateful
from amid_trl.sources.shares import READ_IN
from amid_trl.teacher.served import SERVED


logger = logging.getLogger(__name__)

# There for as long as any process writes into a checkpoint; transformers' own name for it.
UNFINISHED = "checkpoint-is-incomplete.txt"


TRAINER_STATE = "trainer_state.json"  # written last


# In place of a checkpoint: for jobs that are started by the same command the first time and after a kill.
IF_THERE_IS_ONE = "auto"


# What checkpoints of earlier versions do not hold: a part goes on without it.
LATER = {SERVED, READ_IN}


CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


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
    """What is asked for, its files checked; for True and "auto" the last whole checkpoint. All processes have to ask.

    Where there is none True stays, of which transformers complains, and "auto" begins anew.
    """
    checkpoint = asked
    if asked is True or asked == IF_THERE_IS_ONE:
        checkpoint = last_complete_checkpoint(output_dir, accelerator) or (True if asked is True else None)
    if isinstance(checkpoint, str):
        if Path(checkpoint, UNFINISHED).exists():
            raise ValueError(f"{checkpoint} was being written when its run ended; resume from an earlier checkpoint")
        check_files(checkpoint)
        if Path(checkpoint).is_dir():
            check_engine(Path(checkpoint), accelerator)
    return checkpoint


def check_engine(checkpoint: Path, accelerator: Accelerator) -> None:
    """Refuse a checkpoint whose optimizer's state another engine holds, or ZeRO in other parts.

    transformers leaves a state that it does not find where it looks, and begins with a new one.
    """
    as_it_was = (
        "; resume it as it was started (--accelerate_config, --num_processes), or start a new run from its weights"
    )
    saved, here = saved_under(checkpoint), runs_under(accelerator)
    if saved != here and (saved is not None or here != "no engine"):
        held = "holds weights alone" if saved is None else f"was saved under {saved}"
        raise ValueError(f"{checkpoint} {held}, and this run is under {here}{as_it_was}")
    plugin, world = accelerator.state.deepspeed_plugin, accelerator.num_processes
    if plugin is not None and not plugin.deepspeed_config.get("checkpoint", {}).get("load_universal"):
        written, here = checkpoint / str(newest_engine_folder(checkpoint)), zero_stage(accelerator)
        parts = len(list(written.glob("*zero_pp_rank_*_optim_states.pt")))
        shards = holds_zero3(written)
        if shards is not None and (shards != (here == 3) or (here and not parts)):
            saved = "ZeRO-3" if shards else f"DeepSpeed without ZeRO{'-3' if parts else ''}"
            under = f"ZeRO-{here}" if here else "DeepSpeed without ZeRO"
            raise ValueError(f"{checkpoint} was saved under {saved}, and this run is under {under}{as_it_was}")
        if parts not in (0, world):
            raise ValueError(f"{checkpoint} was saved by {parts} processes under ZeRO, not by {world}{as_it_was}")


def saved_under(checkpoint: Path) -> str | None:
    """Under what its optimizer's state was saved; None if it holds none."""
    if newest_engine_folder(checkpoint) is not None:
        return "DeepSpeed"
    if (checkpoint / "optimizer_0").exists() or (checkpoint / "optimizer.bin").exists():
        return "FSDP"
    return "no engine" if (checkpoint / "optimizer.pt").exists() else None


def holds_zero3(written: Path) -> bool | None:
    """Whether DeepSpeed wrote its folder under ZeRO-3, the weights of each process in a file; None of an empty one."""
    files = sorted(written.glob("*model_states.pt"), key=lambda file: file.stat().st_mtime)
    return files[-1].name.startswith("zero_pp_rank_") if files else None


def runs_under(accelerator: Accelerator) -> str:
    """The engine of this run, as `saved_under` names it."""
    if accelerator.state.deepspeed_plugin is not None:
        return "DeepSpeed"
    return "FSDP" if accelerator.is_fsdp2 else "no engine"


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


def newest_complete(output_dir: str) -> Path | None:
    """The newest whole checkpoint; nothing is set aside."""
    return max(filter(is_complete, _checkpoints(Path(output_dir))), key=_step, default=None)


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
            check_engine_file(file)


def save_state(folder: str, parts: Iterable[Stateful], accelerator: Accelerator) -> None:
    """Write what this process needs to go on, if it is anything."""
    state = {name: value for part in parts for name, value in part.state_dict().items()}
    if state:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save({"processes": accelerator.num_processes, **state}, _file(folder, accelerator.process_index))


def load_state(folder: str, parts: Iterable[Stateful], accelerator: Accelerator) -> None:
    """Have the parts go on from the checkpoint; ValueError if it does not have what they need."""
    rank, world = accelerator.process_index, accelerator.num_processes
    states = _Saved(folder)
    for part in parts:
        needed = set(part.state_dict())
        if missing := sorted(needed - LATER - set(states[0] if states else {})):
            raise ValueError(
                f"the checkpoint {folder} holds no state called {', '.join(missing)}: it was saved with other "
                "settings or by save_only_model=True. Start a new run from its weights instead of resuming it"
            )
        if needed:
            try:
                part.resume(states, rank, world)
            except ValueError as error:
                raise ValueError(f"the checkpoint {folder} cannot be resumed: {error}") from error


class _Saved(Sequence[Mapping[str, Any]]):
    """What each process of the earlier run has written, read when it is asked for; the first one says how many."""

    def __init__(self, folder: str):
        self._folder, self._read = folder, {0: _read(folder, 0)}

    def __len__(self) -> int:
        return self._read[0].get("processes", 0)

    def __getitem__(self, rank: Any) -> Any:
        if not 0 <= rank < len(self):
            raise IndexError(rank)
        if rank not in self._read:
            self._read[rank] = _read(self._folder, rank)
        return self._read[rank]


def _file(folder: str, rank: int) -> Path:
    return Path(folder, f"distillation_state_{rank}.pt")


def _read(folder: str, rank: int) -> dict[str, Any]:
    file = _file(folder, rank)
    return torch.load(file, weights_only=True) if file.exists() else {}
