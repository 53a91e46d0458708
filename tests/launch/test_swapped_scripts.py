"""Scripts for DistillationTrainer and GKDTrainer, as users write them, with the two names swapped and no more."""

import runpy
from pathlib import Path

import pytest
import trl
from tiny import chat_prompt_only_dataset, messages_dataset
from transformers import AutoModelForCausalLM


HERE = {"use_cpu": "true", "bf16": "false", "report_to": "none", "max_steps": "2", "save_strategy": "no"}
GKD = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

dataset = load_dataset("data")
training_args = GKDConfig(
    output_dir="out",
    per_device_train_batch_size=1,
    lmbda=0.5,
    beta=0.5,
    temperature=0.9,
    max_new_tokens=8,
    seq_kd=False,
    max_steps=2,
    eval_strategy="epoch",
    save_strategy="no",
    report_to="none",
    bf16=False,
    use_cpu=True,
)
trainer = GKDTrainer(
    model=AutoModelForCausalLM.from_pretrained("student"),
    teacher_model=AutoModelForCausalLM.from_pretrained("teacher"),
    args=training_args,
    processing_class=AutoTokenizer.from_pretrained("student"),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
)
trainer.train()
trainer.save_model()
"""


@pytest.fixture
def place(tmp_path, models, monkeypatch) -> Path:
    """A folder with a pair, where a script runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("student", "teacher"):
        Path(name).symlink_to(models[name])
    return tmp_path


def swapped(script: str, name: str, place: Path) -> Path:
    """The script in a file, with our two names in the place of those that begin so."""
    for before in (f"{name}Trainer", f"{name}Config"):
        assert before in script
        script = script.replace(before, before.replace(name, "AMiD"))
    lines = []
    for line in script.splitlines():
        start, found, names = line.partition(" import ")
        ours = [each for each in names.split(", ") if each.startswith("AMiD")]
        rest = [each for each in names.split(", ") if each not in ours]
        if found and ours and start.split()[0] == "from":
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f"{indent}from amid_trl import {', '.join(ours)}")
            line = f"{start} import {', '.join(rest)}" if rest else ""
        lines.append(line)
    (place / "script.py").write_text("\n".join(lines))
    return place / "script.py"


@pytest.mark.parametrize("lora", [(), ("--use_peft", "--lora_r", "4")], ids=["whole", "lora"])
def test_trls_own_distillation_script(lora, place, monkeypatch):
    for split in ("train", "test"):
        chat_prompt_only_dataset(8).to_json(place / "data" / f"{split}.jsonl")
    script = swapped((Path(trl.__file__).parent / "scripts" / "distillation.py").read_text(), "Distillation", place)
    given = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher", "dataset_name": "data"}
    given |= {**HERE, "output_dir": "out", "max_completion_length": "8", "learning_rate": "2.0e-5"}
    given |= {"eval_strategy": "steps", "eval_steps": "2", "log_completions": "true"}
    flags = [text for name, value in given.items() for text in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", [str(script), *flags, *lora])
    runpy.run_path(str(script), run_name="__main__")
    assert (place / "out" / ("adapter_model" if lora else "model")).with_suffix(".safetensors").exists()


def test_a_script_for_gkd(place):
    for split in ("train", "test"):
        messages_dataset(8).to_json(place / "data" / f"{split}.jsonl")
    found = runpy.run_path(str(swapped(GKD, "GKD", place)))
    history = found["trainer"].state.log_history
    assert found["trainer"].state.global_step == 2 and any("eval_loss" in log for log in history)
    assert AutoModelForCausalLM.from_pretrained(place / "out").config.model_type == "llama"
