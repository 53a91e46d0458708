#!/usr/bin/env bash
# bitsandbytes 0.50.2, LLM.int8() on a CPU: what a layer says of one row depends on the rows that lie beside it, padding included.
# A column in which any token of the pass reaches the threshold is multiplied in half precision for all tokens of the pass, where
# it is rounded to 8 bits otherwise. So the same text alone and in a batch, or padded and not, is read by two models; through the 30
# layers of SmolLM2-135M-Instruct that grew to 2.0 where the largest state is 43. NF4 has nothing of this.
# Seen with the versions below: the outputs of a token with nothing large in it, alone and beside one with a single large entry, differ
# by 0.0006 of their largest; beside one without, by 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/look.py" << 'PYTHON'
import bitsandbytes as bnb
import torch

torch.manual_seed(0)
layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=6.0)
layer.load_state_dict({"weight": torch.randn(64, 64) / 8})
layer = layer.to("cpu").eval()
token, small = torch.randn(2, 1, 64)
large = small.clone()
large[0, 3] = 40.0


def moved(beside: torch.Tensor) -> float:
    """How far the token's outputs move with another one beside it, as a share of the largest."""
    with torch.no_grad():
        alone, together = layer(token), layer(torch.cat([token, beside]))[:1]
    return ((alone - together).abs().max() / alone.abs().max()).item()


found = moved(small), moved(large)
print(f"beside a small token {found[0]:.4f}, beside one with a large entry {found[1]:.4f}")
assert found[0] == 0.0 and found[1] > 0.0002
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 bitsandbytes==0.50.2 numpy
"$folder/venv/bin/python" "$folder/look.py" 2> /dev/null
