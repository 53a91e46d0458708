"""One process of a run with a teacher on vLLM (see tests/vllm/test_teacher.py); the first writes its logs."""

import json
import os
import sys
from pathlib import Path

import torch
from tiny import messages_dataset, tiny_llama, tiny_tokenizer

from amid_trl import AMiDConfig, AMiDTrainer


def main(folder: str, settings: dict) -> None:
    tokenizer = tiny_tokenizer()
    trainer = AMiDTrainer(
        tiny_llama(tokenizer, seed=0),
        args=AMiDConfig(folder, **settings),
        train_dataset=messages_dataset(8),
        eval_dataset=messages_dataset(3),
        processing_class=tokenizer,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        Path(folder, "log.json").write_text(json.dumps(trainer.state.log_history))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.makedirs(sys.argv[1], exist_ok=True)
    main(sys.argv[1], json.loads(sys.argv[2]))
