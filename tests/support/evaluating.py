"""Rows, models and settings for the tests of `amid-trl evaluate`; the fixtures are in conftest.py."""

import json
from pathlib import Path

import torch
from tiny import QUESTIONS, tiny_tokenizer
from transformers import AutoModelForCausalLM

from amid_trl import cli
from amid_trl.evaluation.settings import EvaluationSettings


# 7 rows in batches of 3, so that the last batch is not full; of several references the first is not always the best.
ROWS = [
    *({"prompt": f"{question}\n", "reference": answer} for question, answer in QUESTIONS[:4]),
    {"prompt": "Who wrote this story?\n", "references": ["Nobody knows.", "e e the the the"]},
    {"prompt": [{"role": "user", "content": "When does it sleep?"}], "reference": "Until noon."},
    {"prompt": "One, two, three, four, five: count on.\n", "references": ["Six, seven."]},
]
SHORT = EvaluationSettings("unused", seeds=(10, 20), batch_size=3, max_new_tokens=24)


def jsonl(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def taught(model, steps: int):
    """The model after some steps on the rows, so that it writes words of them, and an end."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        for row in ROWS:
            prompt, answer = tokens_of(row, references_of(row)[0])
            optimiser.zero_grad()
            model(
                torch.tensor([prompt + answer]), labels=torch.tensor([[-100] * len(prompt) + answer])
            ).loss.backward()
            optimiser.step()
    return model


def tokens_of(row: dict, reference: str) -> tuple[list[int], list[int]]:
    """Prompt, and reference with EOS."""
    tokenizer = tiny_tokenizer()
    prompt = row["prompt"]
    if isinstance(prompt, list):
        prompt = f"<|im_start|>user\n{prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(prompt)["input_ids"], tokenizer(reference + "<|im_end|>")["input_ids"]


def references_of(row: dict) -> list[str]:
    return [row["reference"]] if "reference" in row else row["references"]


def logits_behind(path: str, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The logits that predict the answer, in float64."""
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["evaluate", *arguments]) == 2
    return capsys.readouterr().err
