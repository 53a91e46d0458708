#!/usr/bin/env bash
# `from transformers import TrainingArguments`, a class of settings, imports peft, bitsandbytes and torch's compiler
# (torch._inductor) where these are installed. transformers.trainer_utils asks whether peft is installed and imports it
# at once, peft.utils imports bitsandbytes, and bitsandbytes registers operators that it compiles. A command line that
# is built from TrainingArguments therefore answers --help only after seconds, three quarters of them for what it never
# uses; and a message that bitsandbytes writes when it is imported appears before any model is named.
# Seen with the versions below: peft True, bitsandbytes True, torch._inductor.lowering True; without peft all False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 bitsandbytes==0.50.2
look='
import sys
from transformers import TrainingArguments
print(*(f"{name} {name in sys.modules}" for name in ("peft", "bitsandbytes", "torch._inductor.lowering")), sep="\n")'
with_peft=$("$folder/venv/bin/python" -c "$look" 2> /dev/null)
printf 'with peft:\n%s\n' "$with_peft"
"$folder/venv/bin/pip" uninstall -q -y peft
without_peft=$("$folder/venv/bin/python" -c "$look" 2> /dev/null)
printf 'without peft:\n%s\n' "$without_peft"
[ "$with_peft" = $'peft True\nbitsandbytes True\ntorch._inductor.lowering True' ]
[ "$without_peft" = $'peft False\nbitsandbytes False\ntorch._inductor.lowering False' ]
