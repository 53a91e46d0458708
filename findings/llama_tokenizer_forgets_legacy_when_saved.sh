#!/usr/bin/env bash
# transformers 5: a LlamaTokenizer with legacy=True, which Llama 2's published tokenizer_config.json says, is another one when
# it has been saved and loaded. legacy decides whether a space is written in front of every part of a text between special
# tokens, or of the first one alone. It is read when the tokenizer is made, save_pretrained leaves it out of
# tokenizer_config.json, and the class makes its pre-tokenizer anew, with the other default, instead of reading the one that
# lies in tokenizer.json. Who fine-tunes Llama 2 and saves the tokenizer beside the model serves "<s>[INST]" in other tokens
# than it was trained with. Nothing is said, and the text decodes to the same.
# Seen with the versions below: tokenizer.json has prepend_scheme "always" as made and as saved; as made <s> ▁[ a ] </s> ▁a,
# as loaded <s> [ a ] </s> a.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
look='
import json
import sys
from pathlib import Path
from transformers import AutoTokenizer, LlamaTokenizer

pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "[", "]", "a", "▁[", "▁a"]
made = LlamaTokenizer({piece: i for i, piece in enumerate(pieces)}, [("▁", "["), ("▁", "a")], legacy=True)
made.save_pretrained(sys.argv[1])
loaded = AutoTokenizer.from_pretrained(sys.argv[1])
file = json.loads(Path(sys.argv[1], "tokenizer.json").read_text())
print("file", file["pre_tokenizer"]["prepend_scheme"])
for name, tokenizer in (("made", made), ("loaded", loaded)):
    print(name, tokenizer.legacy, *tokenizer.tokenize("<s>[a]</s>a"), "=", tokenizer.decode(tokenizer.encode("[a]", add_special_tokens=False)))'
seen=$("$folder/venv/bin/python" -c "$look" "$folder/saved" 2> "$folder/errors") || { cat "$folder/errors"; exit 1; }
printf '%s\n' "$seen"
[ "$seen" = "file always
made True <s> ▁[ a ] </s> ▁a = [a]
loaded False <s> [ a ] </s> a = [a]" ]
