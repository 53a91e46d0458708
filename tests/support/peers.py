"""TRL's trainers for distillation and ours, built alike on tiny models (see tests/test_peers.py).

As a process of a group it takes one step of plain gradient descent, and rank 0 prints what was logged into FILE:
python peers.py NAME FILE, under the environment of torchrun.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny import messages_dataset, tiny_llama, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from amid_trl import AMiDConfig, AMiDTrainer


TRAINERS = {
    "AMiDTrainer": (AMiDTrainer, AMiDConfig),
    "GKDTrainer": (GKDTrainer, GKDConfig),
    "DistillationTrainer": (DistillationTrainer, DistillationConfig),
    "GOLDTrainer": (GOLDTrainer, GOLDConfig),
}
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 1,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "optim": "sgd",
    "learning_rate": 1e-2,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


def trainer(
    name: str,
    folder: Path,
    rows: Dataset | None = None,
    *,
    student: PreTrainedModel | None = None,
    teacher: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **settings: Any,
) -> Any:
    """The trainer of that name, on the dataset's text where it takes any."""
    tokenizer = tokenizer or tiny_tokenizer()
    trainer_class, config_class = TRAINERS[name]
    own = {"max_completion_length": 6} if name == "DistillationTrainer" else {"lmbda": 0.0}
    rows = rows if rows is not None else messages_dataset(2)
    if name == "DistillationTrainer":  # it reads the prompts alone
        rows = rows.map(lambda row: {"prompt": row["messages"][:-1]}, remove_columns=["messages"])
    return trainer_class(
        student if student is not None else tiny_llama(tokenizer),
        teacher if teacher is not None else tiny_llama(tokenizer, seed=1, hidden_size=48),
        config_class(str(folder), **{**SETTINGS, **own, **settings}),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def logged(made: Any) -> list[dict[str, float]]:
    """What its steps have logged."""
    return [log for log in made.state.log_history if "grad_norm" in log]


def main(name: str, file: str) -> None:
    processes = int(os.environ["WORLD_SIZE"])
    own = {"top_k": 1} if name == "DistillationTrainer" else {}  # the likeliest tokens: the same text on each
    made = trainer(name, Path(file).parent, per_device_train_batch_size=2 // processes, **own)
    made.train()
    if os.environ["RANK"] == "0":
        Path(file).write_text(json.dumps(logged(made)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
