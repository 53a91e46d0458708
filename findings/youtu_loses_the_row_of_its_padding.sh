#!/usr/bin/env bash
# transformers 5: every from_pretrained of a Youtu model sets the embedding of its padding token to zero, whatever the
# checkpoint has. Weights that were loaded are marked so that the initialization that follows leaves them alone; Youtu's
# initializes a row of `module.weight.data`, a tensor without that mark. Where the padding is the EOS token, as in most
# fine-tuning, the model reads nothing where a turn ends, and with tied embeddings the EOS logit is 0 at every place,
# whatever was trained. Nothing is said, and no weight is reported as missing.
# Seen with the versions below, largest difference between saved and loaded weights: Llama 0; Youtu the embedding's row of
# the padding, which is 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
look='
import sys
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, YoutuConfig

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
for kind in (LlamaConfig, YoutuConfig):
    own = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    heads = dict(num_key_value_heads=2, **(own if kind is YoutuConfig else {}))
    config = kind(**sizes, **heads, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # as training would
    model.save_pretrained(sys.argv[1] + kind.__name__)
    loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1] + kind.__name__)
    before, after = model.state_dict(), loaded.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    row = after["model.embed_tokens.weight"][2].abs().max().item() > 0
    logit = loaded(torch.arange(8)[None]).logits[0, :, 2].abs().max().item() > 0
    print(kind.__name__, "changed", *sorted(changed), "row", row, "logit of EOS", logit)'
seen=$("$folder/venv/bin/python" -c "$look" "$folder/model" 2> "$folder/errors") || { cat "$folder/errors"; exit 1; }
printf '%s\n' "$seen"
[ "$seen" = "LlamaConfig changed row True logit of EOS True
YoutuConfig changed lm_head.weight model.embed_tokens.weight row False logit of EOS False" ]
