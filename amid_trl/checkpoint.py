"""What a checkpoint holds beside weights, optimizer and random states: numbers and tensors, loaded without pickle.

Every process writes a file of its own. A run without such state writes none.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from amid_trl.replay import deal


class Stateful(Protocol):
    """A part of a run with a state; several parts share one file, so each names what is its own."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing, if there is no state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what is this part's own."""
        ...


def save_state(folder: str, parts: Iterable[Stateful], accelerator: Accelerator) -> None:
    """Write what this process needs to go on, if it is anything."""
    state = {name: value for part in parts for name, value in part.state_dict().items()}
    if state:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save({"processes": accelerator.num_processes, **state}, _file(folder, accelerator.process_index))


def load_state(folder: str, parts: Iterable[Stateful], accelerator: Accelerator) -> None:
    """Give the parts what this process goes on from; ValueError if the checkpoint does not have it.

    If the number of processes has changed, the replay rows are dealt anew.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    state = _read(folder, rank)
    if state.get("processes") != processes:
        state = _read(folder, 0)
        if "replay" in state:
            earlier = [_read(folder, other)["replay"] for other in range(state["processes"])]
            state["replay"] = deal(earlier, rank, processes)
    for part in parts:
        if missing := set(part.state_dict()) - set(state):
            raise ValueError(
                f"the checkpoint {folder} holds no state called {', '.join(sorted(missing))}: it was saved with other "
                "settings or by save_only_model=True. Start a new run from its weights instead of resuming it"
            )
        part.load_state_dict(state)


def _file(folder: str, rank: int) -> Path:
    return Path(folder, f"distillation_state_{rank}.pt")


def _read(folder: str, rank: int) -> dict[str, Any]:
    file = _file(folder, rank)
    return torch.load(file, weights_only=True) if file.exists() else {}
