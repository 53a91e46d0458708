#!/usr/bin/env bash
# torch 2.13.0, torch.compile on a CPU: expm1 is computed as exp(x) - 1, the cancellation that it exists to avoid. Below
# the rounding of 1 the compiled function is 0 for every x, near 1e-4 it is wrong by half a thousandth, in float64 it
# has seven digits of sixteen at 1e-9. log1p, its inverse, is exact when compiled. So a formula that is written with expm1
# to be stable where its parameter goes to 0 (a mixture of distributions at alpha near 1, for one) is stable in a test that
# runs operation by operation, and flat, without a gradient to speak of, in the compiled run.
# 2 * t / (1 - t) with t = tanh(x / 2) is expm1(x) without the cancellation, compiled too.
# Seen: the lines below; needs a C++ compiler, as torch.compile does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/look.py" << 'PYTHON'
import torch


def by_tanh(x):
    t = torch.tanh(x / 2)
    return 2 * t / (1 - t)


def worst(function, x):
    """The largest relative error, operation by operation and compiled, of a function that is expm1 or log1p."""
    inverse = torch.log1p if function is torch.log1p else torch.expm1
    want = inverse(x.double()) if x.dtype == torch.float32 else inverse(x)
    return [((got(x).double() - want) / want).abs().max().item() for got in (function, torch.compile(function))]


print("torch", torch.__version__)
found = {}
for name, function in (("expm1", torch.expm1), ("by_tanh", by_tanh), ("log1p", torch.log1p)):
    for dtype, size in ((torch.float32, 1e-9), (torch.float32, 1e-4), (torch.float64, 1e-9)):
        x = -torch.linspace(0.5, 1, 4096, dtype=dtype) * size
        plain, compiled = found[name, dtype, size] = worst(function, x)
        print(f"{name:8} {dtype} x about {-size:.0e}: relative error {plain:.1e}, compiled {compiled:.1e}")
assert all(plain < 1e-6 for plain, _ in found.values())
assert found["expm1", torch.float32, 1e-9][1] == 1.0, "all of it is lost"
assert 1e-4 < found["expm1", torch.float32, 1e-4][1] < 1e-2
assert 1e-9 < found["expm1", torch.float64, 1e-9][1] < 1e-6
assert all(compiled < 1e-6 for (name, *_), (_, compiled) in found.items() if name != "expm1")
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.1 setuptools
"$folder/venv/bin/python" "$folder/look.py" 2> /dev/null
