"""Distil Qwen2.5-1.5B-Instruct into Qwen2.5-0.5B-Instruct, save the student and ask it: python examples/minimal.py"""

import torch
from datasets import load_dataset
from transformers import pipeline

from amid_trl import AMiDConfig, AMiDTrainer


rows = load_dataset("trl-lib/chatbot_arena_completions", split="train").train_test_split(test_size=100, seed=0)
trainer = AMiDTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    teacher_model="Qwen/Qwen2.5-1.5B-Instruct",
    args=AMiDConfig(
        "runs/minimal",
        objective="kd",  # KL(p‖q); without it AMiD with the paper's best setting
        lmbda=0.5,  # of half of the steps the student writes the answers
        max_steps=200,
        eval_strategy="steps",
        eval_steps=50,
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],
)
trainer.train()
trainer.save_model()
question = [{"role": "user", "content": "Is water wet?"}]
answer = pipeline("text-generation", trainer.args.output_dir)(question, max_new_tokens=64)
print(answer[0]["generated_text"][-1]["content"])
