#!/usr/bin/env bash
# transformers 5.24.0: Llama4ForConditionalGeneration, which is every published Llama 4, answers nothing any more, with or
# without images: its forward reads `image_outputs` of what its language model returned, which has no such field, and
# raises AttributeError when the logits have been computed; so does `generate`. return_dict=False does not help, because it
# is applied to what the forward returns. Its language model alone answers.
# Seen with the versions below: 5.23.0 gives the language model's logits and writes, 5.24.0 raises AttributeError twice.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/look.py" << 'PYTHON'
import torch
import transformers
from transformers import Llama4Config, Llama4ForConditionalGeneration

torch.manual_seed(0)
text = dict(vocab_size=96, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2)
heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, pad_token_id=0)
vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, image_size=16)
patches = dict(patch_size=8, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)
config = Llama4Config(text_config={**text, **heads}, vision_config={**vision, **patches})
model = Llama4ForConditionalGeneration(config).eval()
ids = torch.arange(2, 10)[None]
with torch.no_grad():
    alone = model.language_model(ids).logits
    try:
        answer = "logits" if torch.equal(model(ids).logits, alone) else "other logits"
    except AttributeError as error:
        answer = f"AttributeError: {error}"
    try:
        model.generate(ids, max_new_tokens=2, do_sample=False)
        written = "writes"
    except AttributeError:
        written = "raises"
print(f"transformers {transformers.__version__}: {answer}; generate {written}")
if transformers.__version__ == "5.23.0":
    assert (answer, written) == ("logits", "writes")
else:
    assert "image_outputs" in answer and written == "raises"
PYTHON
python3 -m venv "$folder/venv"
for version in 5.23.0 5.24.0; do
    "$folder/venv/bin/pip" install -q torch==2.13.0 "transformers==$version"
    "$folder/venv/bin/python" "$folder/look.py" 2> /dev/null
done
