"""`amid-trl serve-teacher`."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from amid_trl.fields import require_package
from amid_trl.models.names import check_adapter_name, check_model_name
from amid_trl.parser import OneLineParser


# Of one request, and of one pass of the model: option -> (what is used where it is not given, what it says).
BOUNDS = {
    "--max-rows": (256, "rows of a request"),
    "--max-tokens": (32768, "tokens of a request"),
    "--max-body-bytes": (2**23, "bytes of a request"),
    "--pass-tokens": (8192, "tokens that the model computes at a time, with their padding; one row at least"),
}


def serve_teacher(argv: Sequence[str]) -> int:
    """Answer for a teacher until SIGTERM or Ctrl-C."""
    parser = OneLineParser("amid-trl serve-teacher")
    parser.add_argument("model", help="name or path of the teacher: a model, or an adapter with its base")
    parser.add_argument("--port", type=int, required=True, help="where it listens; 0 for any that is free")
    parser.add_argument(
        "--host", default="127.0.0.1", help="likewise (default: 127.0.0.1, for this machine alone); 0.0.0.0 for all"
    )
    parser.add_argument("--revision", help="revision of the teacher on the Hub")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of its weights (default: the checkpoint's)")
    parser.add_argument("--device-map", help="where its weights lie, as in from_pretrained: a word, or JSON")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-in-8bit", action="store_true", help="quantise it with bitsandbytes: LLM.int8()")
    bits.add_argument(
        "--load-in-4bit", action="store_true", help="likewise, to 4 bits (NF4), with products in --dtype or bfloat16"
    )
    parser.add_argument("--adapter", help="path of an adapter that is put on the model")
    parser.add_argument("--trust-remote-code", action="store_true", help="load code that ships with the teacher")
    for option, (default, what) in BOUNDS.items():
        parser.add_argument(option, type=int, default=default, help=f"at most so many {what} (default: {default})")
    args = parser.parse_args(argv)
    key = _check(args)

    from amid_trl.teacher.serving import bind, is_loopback, url_of

    with bind(args.host, args.port) as place, tempfile.TemporaryDirectory() as folder:
        signal.signal(signal.SIGTERM, _end)
        if key is None and not is_loopback(place):
            print("amid-trl serve-teacher: no AMID_TRL_API_KEY: whoever reaches the port may ask", file=sys.stderr)
        _serve(args, key, place, url_of(place), Path(folder))
    return 0


def _check(args: Any) -> str | None:
    """What can be known before anything is loaded; the key that clients need."""
    check_model_name("model", args.model)
    check_adapter_name("--adapter", args.adapter)
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port must be from 0 to 65535; got {args.port}")
    for option in BOUNDS:
        if (value := getattr(args, option.removeprefix("--").replace("-", "_"))) < 1:
            raise ValueError(f"{option} must be at least 1; got {value}")
    if args.device_map is not None and args.device_map.lstrip().startswith("{"):
        try:
            args.device_map = json.loads(args.device_map)
        except ValueError as error:
            raise ValueError(f"--device-map is no JSON: {error}") from error
    for package in ("starlette", "uvicorn"):
        require_package(package, "serve-teacher", "'amid_trl[serve]'")
    if args.load_in_8bit or args.load_in_4bit:
        require_package("bitsandbytes", "quantising", "'amid_trl[quantization]'")
    key = os.environ.get("AMID_TRL_API_KEY")
    if key is not None and not key.strip():
        raise ValueError("AMID_TRL_API_KEY is empty: give a key, or unset it")
    return key


def _serve(args: Any, key: str | None, place: Any, url: str, folder: Path) -> None:
    from amid_trl.teacher.head_files import write_head
    from amid_trl.teacher.hosted import Bounds, HostedTeacher, Hosting, load_hosted
    from amid_trl.teacher.serving import build_app, serve

    bits = 8 if args.load_in_8bit else 4 if args.load_in_4bit else None
    hosting = Hosting(
        *(args.model, args.revision, args.dtype, args.device_map, bits, args.adapter, args.trust_remote_code)
    )
    bounds = Bounds(args.max_rows, args.max_tokens, args.max_body_bytes, args.pass_tokens)
    teacher = HostedTeacher(load_hosted(hosting), bounds)
    head = write_head(teacher.head, folder)
    about = teacher.about(hosting, head.stem)
    line = f"{url}: {about.name} in {about.dtype}, vocabulary {about.vocabulary}, dim {about.dim}"
    serve(build_app(teacher, about, head, key), place, line)


def _end(signum: int, frame: object) -> NoReturn:
    """The server has answered what was on its way."""
    raise SystemExit(128 + signum)
