#!/usr/bin/env bash
# AutoModelForCausalLM takes the language model out of a Llama 3.2 Vision checkpoint: a MllamaForCausalLM. What that model
# then saves is a checkpoint of its own, with model_type mllama_text_model, and the same AutoModelForCausalLM refuses to load
# it: the class is registered for the configuration of the whole model alone. A fine-tuned text model can be read again only
# by naming its class. Llama 4's, which is taken out in the same way, comes back.
# Seen with the versions below: "Unrecognized configuration class ... MllamaTextConfig" for the one, Llama4ForCausalLM for
# the other; MllamaForCausalLM.from_pretrained gives the same logits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cat > "$folder/look.py" << 'PYTHON'
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    MllamaConfig,
    MllamaForCausalLM,
    MllamaForConditionalGeneration,
)

folder = Path(sys.argv[1])
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
text = {**sizes, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
whole = {
    "mllama": MllamaForConditionalGeneration(
        MllamaConfig(
            text_config={**text, "cross_attention_layers": [1]},
            vision_config={
                **{**vision, "patch_size": 14, "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 32},
                **{"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
            },
        )
    ),
    "llama4": Llama4ForConditionalGeneration(
        Llama4Config(
            text_config={**text, "intermediate_size_mlp": 64, "num_local_experts": 2},
            vision_config={
                **{**vision, "patch_size": 14, "vision_output_dim": 16},
                **{"projector_input_dim": 16, "projector_output_dim": 16},
            },
        )
    ),
}
ids = torch.arange(3, 11)[None]
found = {}
for name, model in whole.items():
    model.save_pretrained(folder / name)
    alone = AutoModelForCausalLM.from_pretrained(folder / name).eval()
    alone.save_pretrained(folder / f"{name}-text")
    try:
        found[name] = type(AutoModelForCausalLM.from_pretrained(folder / f"{name}-text")).__name__
    except ValueError as error:
        found[name] = " ".join(str(error).split())[:140]
    print(f"{name}: {type(alone).__name__} is saved, and loaded again it is: {found[name]}")
    if name == "mllama":
        again = MllamaForCausalLM.from_pretrained(folder / "mllama-text").eval()
        with torch.no_grad():
            same = torch.equal(again(ids).logits, alone(ids).logits)
        print(f"mllama by its class: the same logits {same}")
assert "Unrecognized configuration class" in found["mllama"] and found["llama4"] == "Llama4ForCausalLM" and same
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/said" || { tail -3 "$folder/said"; exit 1; }
