"""The same rows trained with or without DeepSpeed ZeRO; as a script, one process of it (see test_deepspeed.py)."""

import json
import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny import messages_dataset, multi_turn_dataset, save_tiny, tiny_llama, tiny_tokenizer
from torch import nn

from amid_trl import AMiDConfig, AMiDTrainer


LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


def save_models(folder: Path) -> None:
    """A student with a head of its own, one with a tied head, and a teacher for both; all vocabularies are padded."""
    tokenizer = tiny_tokenizer()
    for name, tied in (("student", False), ("tied_student", True)):
        student = tiny_llama(tokenizer, vocab_size=364, tie_word_embeddings=tied)
        # Every other token ends a completion, so that lengths differ.
        student.generation_config.eos_token_id = list(range(1, len(tokenizer), 2))
        save_tiny(folder / name, student, tokenizer)
    adapter = get_peft_model(student, LoraConfig(**LORA))
    adapter.save_pretrained(folder / "adapter")  # of the tied student
    save_tiny(folder / "teacher", tiny_llama(tokenizer, seed=1, hidden_size=48, vocab_size=368), tokenizer)


def zero(stage: int) -> dict:
    """Like accelerate's configuration of that stage, but small weights are sharded too."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


def run(
    models: Path, output_dir: Path, *, student="student", lora=False, shared_base=False, trains=True, **settings
) -> dict:
    """Train one epoch if asked to, evaluate, save the student in `output_dir`; returns what was logged and seen."""
    if shared_base:
        student, lora, settings["teacher_adapter_path"] = "tied_student", True, str(models / "adapter")
    trainer = AMiDTrainer(
        str(models / student),
        None if shared_base else str(models / "teacher"),
        AMiDConfig(
            **{
                "output_dir": str(output_dir),
                "use_cpu": True,
                "bf16": False,
                "lmbda": 0.0,
                "top_k": 1,
                "num_train_epochs": 1,
                "train_sampling_strategy": "sequential",
                # Weights that follow the gradient's size, which Adam would hide, and no clipping.
                "optim": "sgd",
                "learning_rate": 0.05,
                "max_grad_norm": 100.0,
                "logging_steps": 1,
                "report_to": [],
                "save_strategy": "no",
                "disable_tqdm": True,
                "max_new_tokens": 6,
                **settings,
            }
        ),
        train_dataset=messages_dataset(12),
        eval_dataset=multi_turn_dataset(5),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    lengths, write = [], trainer._writers["student"]

    def write_and_measure(*args):
        completions = write(*args)
        lengths.append([len(completion) for completion in completions])
        return completions

    write_and_measure.config = write.config
    trainer._writers["student"] = write_and_measure
    if trains:
        trainer.train()
    trainer.evaluate()
    shares = [stored_share(model) for model in (trainer.model, trainer.teacher_model) if model is not None]
    trainer.save_model()
    return {"log": trainer.state.log_history, "lengths": lengths, "shares": shares}


def stored_share(model: nn.Module) -> float:
    """Elements of the weights that this process keeps between uses, of all that the model has."""
    stored = sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in model.parameters())
    return stored / sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def main(models: Path, output_dir: Path, stage: int, cases: dict[str, dict]) -> None:
    rank = int(os.environ["RANK"])
    for name, settings in cases.items():
        split = {"deepspeed": zero(stage), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        result = run(models, output_dir / name, **split, **settings)
        (output_dir / name / f"rank{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
