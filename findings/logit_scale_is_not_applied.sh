#!/usr/bin/env bash
# Two families of transformers have a `logit_scale` in their configuration that their logits do not have. Aya Vision's text
# model is a Cohere2, whose causal LM multiplies its logits by logit_scale (1/16 in the released models); the class of the
# whole model has the same weights and leaves the factor out, so that its distribution over the next token is far sharper.
# MPT documents logit_scale as a value to scale the logits by, and never reads it.
# Seen with the versions below: Cohere2ForCausalLM's logits are 1/16 of AyaVisionForConditionalGeneration's for the same
# weights and text; MPT's with logit_scale=0.5 are those without.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cat > "$folder/look.py" << 'PYTHON'
import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Cohere2Config,
    Cohere2ForCausalLM,
    MptConfig,
    MptForCausalLM,
    SiglipVisionConfig,
)

ids = torch.arange(3, 11)[None]
text = Cohere2Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, logit_scale=0.0625
)
vision = SiglipVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
torch.manual_seed(0)
whole = AyaVisionForConditionalGeneration(AyaVisionConfig(text_config=text, vision_config=vision)).eval()
alone = Cohere2ForCausalLM(text).eval()
alone.model.load_state_dict(whole.get_decoder().state_dict())
alone.lm_head.weight.data = whole.get_output_embeddings().weight.data
with torch.no_grad():
    ratio = (alone(ids).logits / whole(ids).logits)[..., 1:]  # the row of the padding token is zero
print(f"Cohere2 / Aya Vision: {ratio.min():.4f} to {ratio.max():.4f}, logit_scale {text.logit_scale}")

logits = []
for scale in (None, 0.5):
    torch.manual_seed(0)
    mpt = MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=32, logit_scale=scale))
    with torch.no_grad():
        logits.append(mpt.eval()(ids).logits)
print(f"MPT with logit_scale=0.5: the logits {'are those without' if torch.equal(*logits) else 'are scaled'}")
assert torch.allclose(ratio, torch.tensor(0.0625), rtol=1e-3) and torch.equal(*logits)
PYTHON
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/said" || { tail -3 "$folder/said"; exit 1; }
