"""Ways to write a window of completions: bare `generate`, ours, and what might be quicker than it.

    python benchmarks/writing.py

needs the wheels of examples/embedded.py. SmolLM2-135M-Instruct answers questions with its most likely tokens, so that
every way writes the same text but for its rounding. All are in one process and take turns; writing.md and
writing.json are written at the end.
"""

import argparse
import copy
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, about, about_line, in_new_process, replace_file
from torch import Tensor
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from amid_trl.data.batches import pad_rows
from amid_trl.models.generation import eos_token_ids, generate_completions, sampling_config, until_eos


sys.path.insert(0, str(ROOT / "examples"))

from embedded import load_teacher, questions


LIBRARIES = ("torch", "transformers", "accelerate", "amid_trl")
TARGET = 1.05  # of bare generate
EACH = 4  # completions of a prompt, where it has several
PAGE = 16  # tokens whose keys and values lie together in continuous batching
PIECE = 32  # tokens between two looks at which rows have finished

BARE, OURS = "bare `generate`", "ours"
SEVERAL, READ_ONCE = f"bare `generate`, {EACH} for a prompt", f"ours, {EACH} for a prompt, which is read once"

Record = dict[str, Any]
Write = Callable[[], list[Tensor]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every way in turn, write the table."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    load_teacher(args.models)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        records = in_new_process(
            args.threads, measure, args.rows, args.new_tokens, args.repeats, args.models, set(args.without)
        )
    command = shlex.join(["python", "benchmarks/writing.py", *argv])
    results = {"about": about(command, LIBRARIES, args.threads, "cpu"), "at_most": TARGET, "records": records}
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "writing.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "writing.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="measured turns, after one for warming up")
    parser.add_argument(
        "--without", nargs="*", choices=OTHERS, default=[], metavar="WAY", help=f"of {', '.join(OTHERS)}"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=ROOT / "runs/demo/teacher", help="where the model is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


def measure(rows: int, new_tokens: int, repeats: int, models: Path, without: set[str]) -> list[Record]:
    """Seconds of every way, and the share of its completions that are bare generate's."""
    model, tokenizer = load_teacher(models)
    model.eval()
    prompts = [
        torch.tensor(
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        )
        for row in questions().train[:rows]
    ]
    config = sampling_config(
        max_new_tokens=new_tokens,
        eos_token_ids=eos_token_ids(tokenizer, model.generation_config),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    several = [prompt for prompt in prompts[: max(1, rows // EACH)] for _ in range(EACH)]
    ways: dict[str, Write] = {
        BARE: lambda: bare(model, prompts, config),
        OURS: lambda: generate_completions(model, prompts, config),
        SEVERAL: lambda: bare(model, several, config),
        READ_ONCE: lambda: generate_completions(model, several, config, each=EACH),
    }
    ways |= {name: lambda way=way: way(model, prompts, config) for name, way in OTHERS.items() if name not in without}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    written: dict[str, list[Tensor]] = {}
    for _ in range(1 + repeats):
        for name, write in ways.items():
            began = time.perf_counter()
            written[name] = write()
            seconds[name].append(time.perf_counter() - began)
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    return [
        {
            "way": name,
            "beside": peer,
            "seconds": statistics.median(all_seconds[1:]),
            # Of neighbours in time, because a machine may be slower at one time than at another.
            "ratio": statistics.median(s / b for s, b in zip(all_seconds[1:], seconds[peer][1:], strict=True)),
            "all_seconds": all_seconds,
            "tokens": sum(map(len, written[name])),
            "equal": sum(map(torch.equal, written[name], written[peer])) / len(written[name]),
        }
        for name, all_seconds in seconds.items()
        for peer in (SEVERAL if name in (SEVERAL, READ_ONCE) else BARE,)
    ]


# ---- The ways ----


def bare(model: PreTrainedModel, prompts: list[Tensor], config: GenerationConfig, **more: Any) -> list[Tensor]:
    """One call of `generate` for all prompts, padded on the left."""
    ids, mask = pad_rows(prompts, config.pad_token_id, side="left")
    generates: Any = model
    written = generates.generate(input_ids=ids, attention_mask=mask, generation_config=changed(config, **more))
    return [until_eos(row, torch.tensor(config.eos_token_id)) for row in written[:, ids.shape[1] :]]


def changed(config: GenerationConfig, **settings: Any) -> GenerationConfig:
    """With these settings in place of its own."""
    other = copy.deepcopy(config)
    other.update(**settings)
    return other


def static(model: PreTrainedModel, prompts: list[Tensor], config: GenerationConfig) -> list[Tensor]:
    """Keys and values in tensors of one size."""
    return bare(model, prompts, config, cache_implementation="static")


def compiled(model: PreTrainedModel, prompts: list[Tensor], config: GenerationConfig) -> list[Tensor]:
    """The same, and the step compiled, which transformers does on a CPU only if it is told to."""
    everywhere = CompileConfig(fullgraph=False, mode="default")
    everywhere._compile_all_devices = True  # type: ignore[assignment]
    how = {"disable_compile": False, "compile_config": everywhere}
    return bare(model, prompts, config, cache_implementation="static", **how)


def leaving(model: PreTrainedModel, prompts: list[Tensor], config: GenerationConfig) -> list[Tensor]:
    """`generate` in pieces; rows that have finished are left out of the next one."""
    ids, mask = pad_rows(prompts, config.pad_token_id, side="left")
    written: list[list[int]] = [[] for _ in prompts]
    alive, cache, ends = list(range(len(prompts))), None, torch.tensor(config.eos_token_id)
    generates: Any = model
    for start in range(0, config.max_new_tokens, PIECE):
        count = min(PIECE, config.max_new_tokens - start)
        piece = changed(config, max_new_tokens=count, return_dict_in_generate=True)
        out = generates.generate(input_ids=ids, attention_mask=mask, generation_config=piece, past_key_values=cache)
        new = out.sequences[:, ids.shape[1] :]
        going = [i for i, row in enumerate(new) if not torch.isin(row, ends).any()]
        for row, place in zip(new, alive, strict=True):
            written[place] += until_eos(row, ends).tolist()
        if not going:
            break
        alive, cache = [alive[i] for i in going], out.past_key_values
        cache.batch_select_indices(torch.tensor(going))
        ids, mask = out.sequences[going], torch.cat([mask, torch.ones_like(new)], 1)[going]
    return [torch.tensor(row) for row in written]


def continuous(model: PreTrainedModel, prompts: list[Tensor], config: GenerationConfig) -> list[Tensor]:
    """Continuous batching of transformers, with keys and values in pages: as many as all rows need, not all memory."""
    generates: Any = model
    own = GenerationConfig(
        do_sample=False,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    pages = sum(-(-(len(prompt) + config.max_new_tokens + 1) // PAGE) for prompt in prompts)
    batching = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=pages + 1,
        max_batch_tokens=sum(map(len, prompts)),
        max_requests_per_batch=len(prompts),
    )
    out = generates.generate_batch(
        [prompt.tolist() for prompt in prompts], generation_config=own, continuous_batching_config=batching
    )
    of_request = sorted(out.values(), key=lambda one: int(one.request_id.split("_")[-1]))
    return [until_eos(torch.tensor(one.generated_tokens), torch.tensor(config.eos_token_id)) for one in of_request]


OTHERS = {
    "static cache": static,
    "static cache, compiled": compiled,
    f"finished rows leave every {PIECE} tokens": leaving,
    "continuous batching": continuous,
}


# ---- What came of them ----


def report(results: Record) -> str:
    """The results as Markdown."""
    records = results["records"]
    lines = [
        "# Writing a window",
        "",
        f"SmolLM2-135M-Instruct in float32 writes its most likely tokens, {records[0]['tokens']} in all. Seconds are "
        f"the median of {len(records[0]['all_seconds']) - 1} turns after a first one, in which a way may compile; the "
        "ratio is the median of those of each turn.",
        "",
        "| | s | × bare `generate` | first, s | tokens | equal completions |",
        "|---|---|---|---|---|---|",
        *(
            f"| {record['way']} | {record['seconds']:.2f} | {record['ratio']:.2f} | {record['all_seconds'][0]:.1f} "
            f"| {record['tokens']} | {record['equal']:.0%} |"
            for record in records
        ),
        "",
        f"Ours was to take at most {results['at_most']} × bare `generate`. {about_line(results['about'])}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
