#!/usr/bin/env bash
# safetensors 0.8: save_file leaves every file with mode 600, whatever the umask is and whatever mode the file had that it
# takes the place of. With 0.7 files had the mode of any new file, and an old one kept its own. transformers writes
# weights so: of a model that save_pretrained puts on a shared disk, colleagues and the service that is to run it can read
# the configuration and the tokenizer, and not the weights.
# Seen with the versions below and umask 022, of a new file, of one that had mode 664, and of two files that
# save_pretrained of transformers 5.23.0 writes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
umask 022
look='
import os, sys
import numpy
import safetensors
from safetensors.numpy import save_file

def mode(file):
    return oct(os.stat(file).st_mode & 0o777)[2:]

file = sys.argv[1] + "/tensors"
save_file({"a": numpy.zeros(3)}, file)
new = mode(file)
os.chmod(file, 0o664)
save_file({"a": numpy.zeros(3)}, file)
print(safetensors.__version__, "new", new, "over 664", mode(file))
os.remove(file)
if len(sys.argv) > 2:
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(file)
    print("config.json", mode(file + "/config.json"), "model.safetensors", mode(file + "/model.safetensors"))'
seen=""
for version in 0.7.0 0.8.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q numpy==2.3.5 "safetensors==$version"
    seen+="$("$folder/$version/bin/python" -c "$look" "$folder")"$'\n'
done
"$folder/0.8.0/bin/pip" install -q torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
seen+=$("$folder/0.8.0/bin/python" -c "$look" "$folder" model 2> "$folder/errors") || { cat "$folder/errors"; exit 1; }
printf '%s\n' "$seen"
[ "$seen" = "0.7.0 new 644 over 664 664
0.8.0 new 600 over 664 600
0.8.0 new 600 over 664 600
config.json 644 model.safetensors 600" ]
