#!/usr/bin/env bash
# TRL 1.16.0: an adapter of one module does not train. `--lora_target_modules q_proj`, or a list of one name in the YAML file of
# trl sft and of every script with ModelConfig, becomes the name alone, meant for "all-linear"; get_peft_config hands it to PEFT,
# which reads text as a pattern of whole module paths and looks for a module that is called q_proj and nothing else. With two
# names it is a list, and both are found. The error names the module that is there.
# Seen with the versions below: two names train 4 modules, one name ends in "Target modules q_proj not found in the base model".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/look.py" << 'PYTHON'
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl import ModelConfig, TrlParser, get_peft_config

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
seen = {}
for names in (["q_proj", "v_proj"], ["q_proj"]):
    [given] = TrlParser(ModelConfig).parse_args_and_config(["--use_peft", "--lora_target_modules", *names])
    try:
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), get_peft_config(given))
        seen[len(names)] = f"{sum('lora_A' in name for name, _ in model.named_parameters())} modules"
    except ValueError as error:
        seen[len(names)] = str(error)[:60]
    print(names, "->", repr(given.lora_target_modules), "->", seen[len(names)])
assert seen[2] == "4 modules" and seen[1].startswith("Target modules q_proj not found in the base model")
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 trl==1.16.0 peft==0.21.2
"$folder/venv/bin/python" "$folder/look.py" 2> /dev/null
