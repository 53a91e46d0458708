#!/usr/bin/env bash
# transformers 5.23.0: packed rows of GPT-OSS and of AFMoE read one another. A row that holds several texts, with positions that
# begin anew and no attention mask, as packing and padding-free training give it, is masked text by text in most families: the mask
# is made from the positions. These two models make theirs without handing the positions on, so that with eager attention (the only
# one but flash that GPT-OSS has) the second text attends to the first. Nothing says so; the loss only becomes another one.
# Seen with the versions below: how far the states of the second text move when the first is another one, as a share of the
# largest: Llama and Qwen3 0, GPT-OSS 0.39, AFMoE 1.78 (tiny models with random weights; the size is theirs, that it is not 0 is not).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/look.py" << 'PYTHON'
import torch
from transformers import AfmoeConfig, AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen3Config

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
MIXTURE = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def moved(config) -> float:
    """How far the second of two packed rows moves, as a share of its largest state, when the first has other tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    positions = torch.tensor([[*range(6), *range(5)]])
    second = torch.arange(20, 25)
    states = []
    with torch.no_grad():
        for first in (torch.arange(1, 7), torch.arange(40, 46)):
            row = torch.cat([first, second])[None]
            states.append(model.model(input_ids=row, position_ids=positions, use_cache=False).last_hidden_state[0, 6:])
    return ((states[0] - states[1]).abs().max() / states[0].abs().max()).item()


found = {
    "llama": moved(LlamaConfig(**SIZES)),
    "qwen3": moved(Qwen3Config(**SIZES)),
    "gpt_oss": moved(GptOssConfig(**SIZES, **MIXTURE)),
    "afmoe": moved(AfmoeConfig(**SIZES, **MIXTURE, num_dense_layers=2)),
}
for name, share in found.items():
    print(f"{name:8} {share:.4f}")
assert found["llama"] == found["qwen3"] == 0.0 and min(found["gpt_oss"], found["afmoe"]) > 0.01
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" "$folder/look.py" 2> /dev/null
