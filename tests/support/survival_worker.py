"""A run on the tiny models in a process of its own, to be killed: python survival_worker.py OUTPUT_DIR SETTINGS.

The setting `file_size` bounds what it can write to a file, in bytes.
"""

import json
import resource
import sys
from pathlib import Path

from observe import LORA
from peft import LoraConfig
from tiny import messages_dataset, tiny_llama, tiny_tokenizer
from transformers import TrainerCallback

from amid_trl import AMiDConfig, AMiDTrainer


SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 2,
    "max_steps": 12,
    "learning_rate": 1e-2,
    "max_new_tokens": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "sampling": "adaptive",
    "adaptive_threshold": 0.7,
    "replay_capacity": 4,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "report_to": [],
    "disable_tqdm": True,
}


class Started(TrainerCallback):
    """Leaves the file `started` when the second step is over."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            Path(args.output_dir, "started").touch()


def run(output_dir: str, resume: bool | str = False, lora: bool = False, callbacks=(), **settings) -> AMiDTrainer:
    tokenizer = tiny_tokenizer()
    trainer = AMiDTrainer(
        tiny_llama(tokenizer, seed=0),
        tiny_llama(tokenizer, seed=1),
        AMiDConfig(output_dir, **{**SETTINGS, **settings}),
        train_dataset=messages_dataset(8),
        eval_dataset=messages_dataset(2),
        processing_class=tokenizer,
        callbacks=[Started(), *callbacks],
        peft_config=LoraConfig(**LORA, lora_dropout=0.1) if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    if bound := settings.pop("file_size", None):
        resource.setrlimit(resource.RLIMIT_FSIZE, (bound, bound))
    run(sys.argv[1], **settings).save_model()
