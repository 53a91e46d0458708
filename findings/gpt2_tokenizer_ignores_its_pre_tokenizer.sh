#!/usr/bin/env bash
# transformers 5: where tokenizer_config.json says GPT2Tokenizer, AutoTokenizer takes vocabulary and merges out of
# tokenizer.json and makes everything else anew, as GPT-2's: its pre-tokenizer is passed over without a word, and text is split
# in another way than the file says. Many byte-level tokenizers of later models declare that class, because transformers 4
# read the file as it is. Digits that the file splits are merged, line ends before a digit become other tokens; the text
# decodes to the same, so that nothing shows it. PreTrainedTokenizerFast in the place of GPT2Tokenizer reads the file.
# Reported from elsewhere as allenai/open-instruct#1896, for OLMo's tokenizer.
# Seen with the versions below, '\n\n1.' by a tokenizer that has each digit alone: 5.23.0 ĊĊ 1 . by tokenizers and by
# PreTrainedTokenizerFast, Ċ Ċ 1 . by GPT2Tokenizer; 4.57.6 ĊĊ 1 . by all three.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
look='
import json
import sys
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
folder.mkdir()
made = Tokenizer(models.BPE())
digits = pre_tokenizers.Digits(individual_digits=True)
made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
made.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False)
made.train_from_iterator(["\n\n1. one\n\n2. two\n\n3. three"] * 9, trainer)
made.save(str(folder / "tokenizer.json"))
(folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
print("file", *made.encode("\n\n1.").tokens)
for name in ("GPT2Tokenizer", "PreTrainedTokenizerFast"):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "eos_token": "<|end|>"}))
    print(name, *AutoTokenizer.from_pretrained(folder).tokenize("\n\n1."))'
for version in 4.57.6 5.23.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q "transformers==$version"
    "$folder/$version/bin/python" -c "$look" "$folder/files-$version" > "$folder/seen" 2> "$folder/errors" ||
        { cat "$folder/errors"; exit 1; }
    sed "s/^/$version /" "$folder/seen" >> "$folder/all"
done
cat "$folder/all"
[ "$(cat "$folder/all")" = "4.57.6 file ĊĊ 1 .
4.57.6 GPT2Tokenizer ĊĊ 1 .
4.57.6 PreTrainedTokenizerFast ĊĊ 1 .
5.23.0 file ĊĊ 1 .
5.23.0 GPT2Tokenizer Ċ Ċ 1 .
5.23.0 PreTrainedTokenizerFast ĊĊ 1 ." ]
