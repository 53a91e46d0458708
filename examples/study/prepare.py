"""Write what study.yaml and second.yaml read, under runs/study: teacher, student, and questions in five files.

    python examples/study/prepare.py

needs the wheels of examples/embedded.py.
"""

import json
import sys
from pathlib import Path

from amid_trl.models.layers import parse_layers
from amid_trl.models.pruning import drop_layers


sys.path.insert(0, str(Path(__file__).parents[1]))
from embedded import load_teacher, questions


OUTPUT = Path("runs/study")
DROPPED_LAYERS = "16-21"
HELD_OUT_QUESTIONS = 96
SEARCHED_BY = 64  # prompts of the training rows, by which second.py chooses settings


def main() -> None:
    """The demo's student, and more held-out questions than the demo has."""
    teacher, tokenizer = load_teacher(OUTPUT)
    drop_layers(teacher, parse_layers(DROPPED_LAYERS)).save_pretrained(OUTPUT / "student")
    tokenizer.save_pretrained(OUTPUT / "student")
    data = questions(HELD_OUT_QUESTIONS)
    write(OUTPUT / "data" / "train.jsonl", data.train)
    write(OUTPUT / "data" / "test.jsonl", data.held_out)
    for split, rows in for_searching(data.train).items():
        write(OUTPUT / "search" / f"{split}.jsonl", rows)
    write(OUTPUT / "questions.jsonl", with_references(data.held_out))
    print(f"{OUTPUT}: {data.counts}")


def for_searching(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows to train, and those of the last prompts, by which settings are chosen: the study's own rows are not."""
    prompts = list(dict.fromkeys(row["prompt"][0]["content"] for row in rows))
    chosen = set(prompts[-SEARCHED_BY:])
    is_chosen = [row["prompt"][0]["content"] in chosen for row in rows]
    return {
        split: [row for row, here in zip(rows, is_chosen, strict=True) if here == (split == "test")]
        for split in ("train", "test")
    }


def with_references(rows: list[dict]) -> list[dict]:
    """One row for each prompt, as it is spelled, with all of its answers."""
    answers: dict[str, list[str]] = {}
    for row in rows:
        answers.setdefault(row["prompt"][0]["content"], []).append(row["completion"][0]["content"])
    return [
        {"prompt": [{"role": "user", "content": question}], "references": references}
        for question, references in answers.items()
    ]


def write(file: Path, rows: list[dict]) -> None:
    """JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
