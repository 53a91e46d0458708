"""Tiny models trained under one engine after the other; as a script, one process of it (see test_memory.py)."""

import json
import os
import sys
from pathlib import Path

import torch
from engine_worker import without_shared_memory
from tiny import messages_dataset, save_tiny, tiny_llama, tiny_tokenizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.training.memory import expected_gradients, expected_optimizer_state, held, optimizer_state, weights


ENGINES = ("ddp", "zero1", "zero2", "zero3")


def save_models(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    # Wide enough that what is rounded up to a multiple of the processes is nothing beside the rest.
    save_tiny(folder / "student", tiny_llama(tokenizer, hidden_size=64), tokenizer)
    save_tiny(folder / "teacher", tiny_llama(tokenizer, seed=1, hidden_size=96), tokenizer)


def zero(stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def trained(models: Path, output_dir: Path, **settings) -> AMiDTrainer:
    """Two steps of it."""
    trainer = AMiDTrainer(
        str(models / "student"),
        str(models / "teacher"),
        AMiDConfig(
            output_dir=str(output_dir),
            use_cpu=True,
            bf16=False,
            lmbda=0.0,
            max_steps=2,
            per_device_train_batch_size=2,
            optim="adamw_torch",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=messages_dataset(8),
    )
    trainer.train()
    return trainer


def measured(trainer: AMiDTrainer) -> dict:
    """What this process holds, and what was said about it."""
    model, optimizer = trainer.model, trainer.optimizer
    return {
        "student": sum(weights(model).values()),
        "teacher": sum(weights(trainer.teacher_model).values()),
        "optimizer": sum(optimizer_state(optimizer, model).values()),
        "expected_optimizer": expected_optimizer_state(optimizer, model, trainer.accelerator),
        "expected_gradients": expected_gradients(model, trainer.accelerator),
        "logged": [entry for entry in trainer.state.log_history if "memory/student_gib" in entry][-1],
    }


def main(models: Path, output_dir: Path) -> None:
    without_shared_memory()
    rank, found = int(os.environ["RANK"]), {}
    for engine in ENGINES:
        settings = {} if engine == "ddp" else {"deepspeed": zero(int(engine[-1]))}
        trainer = trained(models, output_dir / engine, **settings)
        found[engine] = measured(trainer)
    # FSDP2 shards like this.
    shard = distribute_tensor(torch.zeros(8, 4), init_device_mesh("cpu", (2,)), [Shard(0)])
    found["shard"] = sum(held([nn.Parameter(shard)]).values())
    trainer._parts.memory._teachers[""] = nn.Linear(2**10, 2**10 * (1 + rank), bias=False)  # 4 MiB, and 8
    found["uneven"] = trainer._parts.memory.figures
    (output_dir / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
