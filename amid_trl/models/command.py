"""`amid-trl init-student` and `amid-trl merge`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amid_trl.models.layers import parse_layers
from amid_trl.models.names import check_adapter_name, check_model_name
from amid_trl.outputs import let_others_read_weights
from amid_trl.parser import OneLineParser


def init_student(argv: Sequence[str]) -> int:
    """Save a student made of some of a teacher's layers, or of its first tokens, or both; the exit status."""
    parser = OneLineParser("amid-trl init-student")
    parser.add_argument("teacher", help="name or path of the model to start from")
    parser.add_argument("output_dir", help="where the student and its tokenizer are saved")
    parser.add_argument("--drop-layers", help="decoder layers to leave out, such as 16-21,25")
    parser.add_argument(
        "--vocabulary", type=int, help="how many tokens to keep: the first that the tokenizer's BPE makes"
    )
    parser.add_argument("--revision", help="revision of the teacher on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="load code that ships with the teacher")
    args = parser.parse_args(argv)
    if args.drop_layers is None and args.vocabulary is None:
        parser.error("a student is smaller than its teacher: give --drop-layers, --vocabulary or both")
    layers = () if args.drop_layers is None else parse_layers(args.drop_layers)
    _check_new(args.output_dir)
    check_model_name("teacher", args.teacher)

    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from amid_trl.models.multimodal import text_loader
    from amid_trl.models.pruning import drop_layers, keep_tokens
    from amid_trl.models.vocabulary import first_tokens

    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    tokenizer, ids = AutoTokenizer.from_pretrained(args.teacher, **source), None
    if args.vocabulary is not None:  # before the weights are read: it may be refused
        rows = AutoConfig.from_pretrained(args.teacher, **source).get_text_config().vocab_size
        tokenizer, ids = first_tokens(tokenizer, args.vocabulary, rows)
    loader: Any = text_loader(args.teacher, source) or AutoModelForCausalLM
    teacher = loader.from_pretrained(args.teacher, dtype="auto", **source)
    student = drop_layers(teacher, layers) if layers else teacher
    if ids is not None:
        student = keep_tokens(student, ids)
    student.save_pretrained(args.output_dir)
    let_others_read_weights(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    before, after = (model.config.get_text_config() for model in (teacher, student))
    print(
        f"{args.output_dir}: {after.num_hidden_layers} of {before.num_hidden_layers} layers, "
        f"{after.vocab_size:,} of {before.vocab_size:,} tokens, "
        f"{student.num_parameters():,} of {teacher.num_parameters():,} parameters"
    )
    return 0


def merge(argv: Sequence[str]) -> int:
    """Save a plain model made of an adapter and its base; the exit status."""
    parser = OneLineParser("amid-trl merge")
    parser.add_argument("adapter", help="path of the adapter")
    parser.add_argument("output_dir", help="where the merged model and its tokenizer are saved")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of the merged weights (default: float32)")
    args = parser.parse_args(argv)
    _check_new(args.output_dir)
    check_adapter_name("adapter", args.adapter)

    import torch
    from transformers import AutoTokenizer

    from amid_trl.models.generation import eos_token_ids
    from amid_trl.models.merging import merged_model

    tokenizer = AutoTokenizer.from_pretrained(args.adapter)
    merged = merged_model(args.adapter, tokenizer, getattr(torch, args.dtype))
    if (generation := merged.model.generation_config) is not None:  # an adapter has none of its own
        generation.eos_token_id = eos_token_ids(tokenizer, generation) or None
    merged.model.save_pretrained(args.output_dir)
    let_others_read_weights(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    cost = f"KL(unmerged || merged) {merged.kl:.2g} nats a token"
    print(f"{args.output_dir}: merged {args.adapter} in {args.dtype}, {cost}")
    return 0


def _check_new(output_dir: str) -> None:
    if Path(output_dir, "config.json").exists():
        raise ValueError(f"{output_dir} holds a model already; choose another output_dir")
