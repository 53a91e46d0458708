#!/usr/bin/env bash
# A checkpoint that transformers' Trainer has written under DeepSpeed's ZeRO, resumed by a Trainer without DeepSpeed: it
# takes the weights, the learning rate's schedule and the step at which the run was, and begins with an empty optimizer,
# because AdamW's moments lie in DeepSpeed's own files, which nobody looks for. Nothing is raised, nothing is said. Four
# steps in two pieces then leave an AdamW that has seen two. The same two pieces without DeepSpeed leave one of four.
# A run that was trained on many devices and is finished on one, or whose configuration file is forgotten, is such a run.
# Seen with the versions below, ZeRO-1, one process, on a CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 transformers==5.23.0 accelerate==1.15.0 deepspeed==0.19.8 \
    setuptools
piece='
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

run, zero, resumed = sys.argv[1], sys.argv[2] == "zero", sys.argv[3] == "resumed"
torch.manual_seed(0)
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
rows = [{"input_ids": [i % 32] * 4, "labels": [i % 32] * 4} for i in range(8)]
args = TrainingArguments(
    run, max_steps=4, per_device_train_batch_size=2, save_steps=2, learning_rate=1e-3, report_to="none",
    use_cpu=True, bf16=False, disable_tqdm=True, logging_strategy="no",
    deepspeed={
        "zero_optimization": {"stage": 1},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    } if zero else None,
)
trainer = Trainer(LlamaForCausalLM(LlamaConfig(**sizes)), args, train_dataset=rows)
trainer.train(resume_from_checkpoint=f"{run}/checkpoint-2" if resumed else None)
if resumed:
    state = next(iter(trainer.optimizer.state.values()))
    print("steps of the run", trainer.state.global_step, "steps that AdamW has seen", int(state["step"]))'
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29571
seen=""
for engine in zero plain; do
    "$folder/venv/bin/python" -c "$piece" "$folder/$engine" "$engine" new > "$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
    "$folder/venv/bin/python" -c "$piece" "$folder/$engine" plain resumed > "$folder/out" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
    seen+="first piece $engine: $(grep '^steps' "$folder/out")"$'\n'
    if grep -i "optimizer" "$folder/log"; then exit 1; fi
done
printf '%s' "$seen"
[ "$seen" = "first piece zero: steps of the run 4 steps that AdamW has seen 2
first piece plain: steps of the run 4 steps that AdamW has seen 4
" ]
