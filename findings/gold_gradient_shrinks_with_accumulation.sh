#!/usr/bin/env bash
# TRL 1.16.0, GOLDTrainer on the dataset's text: two equal rows in two accumulated micro-batches have half of the gradient that
# they have in one. Both are one optimizer step on the same rows. Its dataloader yields the rows of the whole window once for each
# accumulated step, and the trainer takes its part of them; but the tokens by which the loss is divided are counted before, in all
# that was yielded: n accumulated steps divide by n times the tokens. GKDTrainer of the same version, given the same rows, has the
# same gradient both ways.
# Seen with the versions below: GKDTrainer 1.00, GOLDTrainer 0.50.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/look.py" << 'PYTHON'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

VOCABULARY = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
ROW = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "two three"}]


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(VOCABULARY), pad_token_id=0, eos_token_id=1, bos_token_id=None, **size))


def gradient(trainer_class, config_class, rows: int, accumulated: int, output: str, **own: int) -> float:
    """The norm of one optimizer step on two equal rows."""
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(VOCABULARY)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    config = config_class(
        output,
        lmbda=0.0,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulated,
        max_steps=1,
        max_length=64,
        logging_steps=1,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **own,
    )
    data = Dataset.from_list([{"messages": ROW}] * 2)
    trainer = trainer_class(model(0), model(1), args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)


found = {}
for trainer_class, config_class, own in (
    (GKDTrainer, GKDConfig, {}),
    (GOLDTrainer, GOLDConfig, {"max_completion_length": 16}),
):
    one, two = (gradient(trainer_class, config_class, *split, sys.argv[1], **own) for split in ((2, 1), (1, 2)))
    found[trainer_class.__name__] = two / one
    print(f"{trainer_class.__name__}: gradient of two accumulated rows / of both in one batch: {two / one:.2f}")
assert abs(found["GKDTrainer"] - 1) < 0.01 and abs(found["GOLDTrainer"] - 0.5) < 0.01
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 trl==1.16.0
"$folder/venv/bin/python" "$folder/look.py" "$folder/out" 2> /dev/null | grep gradient
