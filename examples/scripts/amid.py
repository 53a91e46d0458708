# /// script
# requires-python = ">=3.11"
# dependencies = ["amid_trl"]
#
# [tool.uv.sources]  # `uv run` takes this checkout's; elsewhere install amid_trl and run with that Python
# amid_trl = { path = "../.." }
# ///
"""
Distil a teacher into a student with AMiD.

# Full training
python examples/scripts/amid.py \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --teacher_model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name trl-lib/chatbot_arena_completions \
    --assistant_alpha -5 --assistant_lambda 0.1 \
    --learning_rate 2e-5 \
    --output_dir Qwen2.5-0.5B-AMiD

# LoRA, on several GPUs
accelerate launch --config_file amid_trl/launch/accelerate_configs/zero2.yaml examples/scripts/amid.py \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --teacher_model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name trl-lib/chatbot_arena_completions \
    --learning_rate 2e-4 \
    --output_dir Qwen2.5-0.5B-AMiD \
    --use_peft --lora_r 64 --lora_alpha 16
"""

# First, because it hides lines that the others print when they are imported.
from amid_trl import AMiDConfig, AMiDTrainer


# isort: split
from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, AMiDConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()

    ################
    # Models
    ################
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    training_args.teacher_model_init_kwargs = {
        "attn_implementation": model_args.attn_implementation,
        **(training_args.teacher_model_init_kwargs or {}),
    }

    ################
    # Dataset
    ################
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)

    ################
    # Training
    ################
    trainer = AMiDTrainer(
        model=model_args.model_name_or_path,
        teacher_model=training_args.teacher_model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.train()
    trainer.save_state()  # the logs, of which `amid-trl report` makes a page

    # Save and push to hub
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
