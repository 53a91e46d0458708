#!/usr/bin/env bash
# TRL ships DeepSeek-V3's chat template twice, as it is and for training, and no form of a tool call's arguments is right for
# both. The documented form is an object: the original joins it to a string and raises a TypeError; the one for training
# writes it as JSON. Given as JSON text, as OpenAI's API does, the original is right, and the one for training writes the
# text as JSON once more, quotes and backslashes included. Who trains with one and generates with the other has to change
# the data in between.
# Seen with the versions below: object: TypeError and {"city": "Paris"}; text: {"city": "Paris"} and "{\"city\": \"Paris\"}".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 jinja2
"$folder/venv/bin/pip" install -q --no-deps trl==1.16.0
cat > "$folder/look.py" << 'PYTHON'
import json
from importlib.util import find_spec
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

templates = Path(find_spec("trl").origin).parent / "chat_templates"
found = {}
for form, arguments in (("object", {"city": "Paris"}), ("text", '{"city": "Paris"}')):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    chat = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    for name in ("deepseekv3", "deepseekv3_training"):
        template = (templates / f"{name}.jinja").read_text(encoding="utf-8")
        try:
            [text], _ = render_jinja_template([chat], chat_template=template, bos_token="", eos_token="")
            found[form, name] = text[text.index("```json") + 8 :].split("\n")[0]
        except TypeError as error:
            found[form, name] = type(error).__name__
        print(f"{form}, {name}: {found[form, name]}")
right = json.dumps({"city": "Paris"})
assert list(found.values()) == ["TypeError", right, right, json.dumps(right)]
PYTHON
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/said" || { tail -3 "$folder/said"; exit 1; }
