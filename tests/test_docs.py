"""Every block of Python in docs/ runs, on tiny stand-ins for models and data; every link leads somewhere."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import messages_dataset, prompt_only_dataset

from amid_trl import AMiDConfig, AMiDTrainer


DOCS = Path(__file__).parents[1] / "docs"
SETTINGS = "use_cpu=True, bf16=False, max_steps=2, report_to='none', save_strategy='no'"


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


# "page, number of the block"; a page without Python has none.
BLOCKS = {
    f"{page.name} {number}": code for page in sorted(DOCS.glob("*.md")) for number, code in enumerate(blocks(page))
}


@pytest.fixture
def in_place_of(tmp_path, student, teacher, models, rows_file, measured, tokenizer):
    """For each block: the names that it takes for granted, and what stands in it in place of what."""
    trainer = {"student": student, "teacher": teacher}
    config = {'AMiDConfig("out"': f"AMiDConfig({str(tmp_path / 'out')!r}, {SETTINGS}"}
    public = {"AMiDConfig": AMiDConfig, "AMiDTrainer": AMiDTrainer, "tokenizer": tokenizer}
    tensors = {f"{model}_hidden": torch.randn(5, width) for model, width in (("student", 8), ("teacher", 12))}
    heads = {f"{model}_head": torch.nn.Linear(width, 30) for model, width in (("student", 8), ("teacher", 12))}
    (tmp_path / "landscape.json").write_text(json.dumps(measured))
    history = [{"step": step, "loss": 1.0 / step, "kl": 2.0 / step, "grad_norm": 1.0} for step in (1, 2, 3)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    swept = {"number": 0, "params": {"assistant_alpha": 0.5}, "state": "complete", "value": 1.0, "intermediate": {}}
    of_sweep = {"metric": "eval_kl", "budget": {"steps": 2}, "space": {"assistant_alpha": {"low": -5, "high": 1}}}
    (tmp_path / "sweep.json").write_text(json.dumps({**of_sweep, "trials": [swept], "best": swept}))
    return {
        "migrating.md 0": ({**trainer, "rows": messages_dataset(8)}, config),
        "migrating.md 1": (
            {**trainer, "prompts": prompt_only_dataset(8)},
            {
                'AMiDConfig(\n        "out"': f"AMiDConfig({str(tmp_path / 'out')!r}, {SETTINGS}",
                "max_completion_length=512": "max_completion_length=8",
            },
        ),
        "trainer.md 0": ({**trainer, "rows": messages_dataset(8)}, config),
        "trainer.md 1": ({**trainer, "rows": messages_dataset(8)}, {**config, "batch_size=8": "batch_size=4"}),
        "trainer.md 2": ({**trainer, "prompts": prompt_only_dataset(8)}, config),
        "quickstart.md 0": (
            {},
            {
                **config,
                '"Qwen/Qwen2.5-0.5B-Instruct"': repr(models["student"]),
                '"Qwen/Qwen2.5-1.5B-Instruct"': repr(models["teacher"]),
            },
        ),
        "choosing.md 0": ({**trainer, "rows": messages_dataset(8)}, config),
        "choosing.md 1": ({**tensors, **heads}, {}),
        "report.md 0": (
            {},
            {
                "runs/student/": f"{tmp_path}/",
                "runs/landscape/": f"{tmp_path}/",
                "runs/sweep/": f"{tmp_path}/",
                "runs/compare/": f"{DOCS.parent}/examples/study/results/",
                '(f"{name}.svg")': f'(f"{tmp_path}/{{name}}.svg")',
            },
        ),
        "teacher.md 0": (
            {**trainer, "rows": messages_dataset(8).add_column("teacher", ["math", "chat"] * 4), **public},
            {
                'AMiDConfig(\n        "out"': f"AMiDConfig({str(tmp_path / 'out')!r}, {SETTINGS}",
                '"Qwen/Qwen2.5-Math-7B-Instruct"': repr(models["teacher"]),
                '"Qwen/Qwen2.5-7B-Instruct"': repr(models["student"]),
            },
        ),
        "loss.md 0": ({**tensors, **heads}, {}),
        "evaluation.md 0": (
            {},
            {
                '"runs/student"': repr(models["student"]),
                '"runs/teacher"': repr(models["teacher"]),
                '"runs/dolly"': repr(str(tmp_path / "dolly")),
                'EvaluationSettings("dolly"': f"EvaluationSettings({rows_file!r}, seeds=(0,), max_new_tokens=4",
            },
        ),
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_python_in_the_docs_runs(block, in_place_of, tokenizer):
    names, replaced = in_place_of.get(block, ({}, {}))
    code = BLOCKS[block]
    for theirs, ours in replaced.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    if "processing_class" not in code and "AMiDTrainer(" in code:  # tiny models lie beside no tokenizer
        code = code.replace("teacher_model=teacher,", "teacher_model=teacher, processing_class=tokenizer,")
        names = {**names, "tokenizer": tokenizer}
    exec(compile(code, block, "exec"), names)
    made = names.get("trainer")
    assert made is None or made.state.global_step == 2


def test_every_stand_in_is_for_a_block(in_place_of):
    assert set(in_place_of) <= set(BLOCKS)
    assert len(BLOCKS) >= 4


# ---- Links and paths ----

PAGES = [*sorted(DOCS.glob("*.md")), DOCS.parent / "README.md"]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    prose = re.sub(r"`[^`]*`", "code", page.read_text())
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", prose):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# Relative to the root, or to the folder of the package or of the tests; the changelog names what was.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "changelog.md"], ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    root = DOCS.parent
    named = re.findall(r"`((?:[\w.]+/)+[\w.]*)`", page.read_text())
    ours = [path for path in named if path.split("/")[0] in ("amid_trl", "tests", "docs", "examples", "benchmarks")]
    folders = {path.name for path in (root / "amid_trl").iterdir() if path.is_dir()}
    ours += [f"amid_trl/{path}" for path in named if path.split("/")[0] in folders and not path.endswith(".json")]
    assert not [path for path in ours if not (root / path).exists()]
