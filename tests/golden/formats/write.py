"""Write the golden files beside this script: what a version of the package leaves on disk, for later ones to open.

Run it with the version that is to be kept, from a clean checkout of it:

    PYTHONPATH=CHECKOUT python tests/golden/formats/write.py

Those in the repository are of commit 882014e, the last one before the package was put into folders; `origin.json` has
the commit and the versions of the other packages. The script uses the public names and commands, the reader of the
cache, and the checkout's own builders of tiny models. Paths in the files are relative to this folder. `runs.json` has
what the runs are of, and what the version that wrote the checkpoints logs when it goes on from them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

import amid_trl
from amid_trl import AMiDConfig, AMiDTrainer


FOLDER = Path(__file__).parent
CHECKOUT = Path(amid_trl.__file__).parents[1]
sys.path += [str(CHECKOUT / "tests"), str(CHECKOUT / "tests" / "support")]

from evaluating import ROWS, jsonl, taught  # noqa: E402 (their folder is on the path only now)
from tiny import CORPUS, messages_dataset, save_tiny, tiny_llama, tiny_tokenizer  # noqa: E402 (their folder is on the path only now)


TINY = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "max_new_tokens": 8,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "steps",
    "max_steps": 8,
    "save_steps": 4,
}
# What each run is of, beside SETTINGS; `lora` is the adapter's.
RUNS = {
    "adaptive": {
        "settings": {
            "sampling": "adaptive",
            "adaptive_threshold": 0.8,
            "adaptive_tolerance": 0.0,
            "learning_rate": 5e-2,
            "replay_share": "constant",
            "replay_capacity": 4,
            "eval_strategy": "steps",
            "eval_steps": 1,
        }
    },
    "taid": {
        "settings": {
            "objective": "taid",
            "assistant_lambda_schedule": {"kind": "taid", "rate": 0.5},
            "lmbda": 0.5,
            "max_length": 48,
            "pretrain_dataset": "plain",
        },
        "lora": {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    },
}
EVALUATION = {"teacher": "teacher", "evaluation_set": "rows.jsonl"}
EVALUATION |= {"batch_size": 3, "max_new_tokens": 24, "seeds": [10, 20]}


def trained(run: dict, output_dir: str, checkpoint: str | None = None) -> AMiDTrainer:
    trainer = AMiDTrainer(
        "student",
        "teacher",
        AMiDConfig(output_dir, **{**SETTINGS, **run["settings"]}),
        train_dataset=Dataset.from_json("data/train.jsonl"),
        eval_dataset=Dataset.from_json("data/test.jsonl"),
        peft_config=LoraConfig(**run["lora"]) if "lora" in run else None,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(CHECKOUT), *arguments], check=True, capture_output=True, text=True).stdout


def amid(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "amid_trl", *arguments], check=True)


def main() -> None:
    if changed := git("status", "--porcelain"):
        raise SystemExit(f"{CHECKOUT} has changes, so that no commit says what wrote these files:\n{changed}")
    os.environ["PYTHONPATH"] = str(CHECKOUT)
    for old in FOLDER.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    os.chdir(FOLDER)
    write_inputs()
    write_checkpoints()
    write_cache()
    write_evaluations()
    shutil.rmtree("scratch")
    for lock in FOLDER.rglob(".lock"):
        lock.unlink()
    write_origin()


def write_inputs() -> None:
    tokenizer = tiny_tokenizer()
    save_tiny(FOLDER / "student", tiny_llama(tokenizer, seed=0, **TINY), tokenizer)
    save_tiny(FOLDER / "teacher", taught(tiny_llama(tokenizer, seed=1, **TINY), steps=3), tokenizer)
    for folder in ("data", "plain"):
        Path(folder).mkdir()
    messages_dataset(8).to_json("data/train.jsonl")
    messages_dataset(4).to_json("data/test.jsonl")
    jsonl(Path("plain/train.jsonl"), [{"text": text} for text in CORPUS])
    jsonl(Path("rows.jsonl"), ROWS)


def write_checkpoints() -> None:
    runs = {}
    for name, run in RUNS.items():
        uninterrupted = trained(run, f"scratch/{name}")
        shutil.copytree(f"scratch/{name}/checkpoint-4", f"checkpoints/{name}/checkpoint-4")
        # Pickled by the name of its module, and read by nobody who resumes.
        os.remove(f"checkpoints/{name}/checkpoint-4/training_args.bin")
        Path(f"checkpoints/{name}/checkpoint-4/README.md").unlink(missing_ok=True)
        resumed = trained(run, f"scratch/{name}-resumed", f"checkpoints/{name}/checkpoint-4")
        [log] = {json.dumps(losses(trainer)) for trainer in (uninterrupted, resumed)}
        weights = load_file(next(Path(f"scratch/{name}-resumed/checkpoint-8").glob("*model.safetensors")))
        sums = {key: weight.double().square().sum().item() for key, weight in sorted(weights.items())}
        settings = {**SETTINGS, **run["settings"]}
        runs[name] = {**run, "settings": settings, "log": json.loads(log), "squares_of_weights": sums}
    write("runs.json", runs)


def losses(trainer: AMiDTrainer) -> list[dict[str, float]]:
    """What was logged from step 5 on, but for times and memory."""
    measured = ("runtime", "_per_sec", "seconds/", "_gb", "memory", "flos")
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in measured)}
        for entry in trainer.state.log_history
        if entry["step"] > 4 and "train_loss" not in entry
    ]


def write_cache() -> None:
    settings = {
        "model_name_or_path": "student",
        "teacher_model_name_or_path": "teacher",
        "dataset_name": "data",
        "teacher_cache": "cache",
        "teacher_top_k": 4,
        "output_dir": "scratch/cache",
        "use_cpu": True,
        "bf16": False,
        "lmbda": 0.0,
        "max_new_tokens": 8,
        "num_processes": 1,
        "report_to": "none",
    }
    write("scratch/cache.yaml", settings)  # JSON is YAML
    amid("cache-teacher", "--config", "scratch/cache.yaml")
    cache = open_cache()
    shard = load_file("cache/shard-0-00000.safetensors")
    rows = {bytes(key).hex(): cache.row(bytes(key))._asdict() for key in shard["keys"].tolist()}
    write("cache.json", {key: {name: part.tolist() for name, part in row.items()} for key, row in rows.items()})


def open_cache():
    try:
        from amid_trl.teacher.cache import TeacherCache
    except ImportError:  # before there were folders
        from amid_trl.teacher_cache import TeacherCache
    return TeacherCache("cache")


def write_evaluations() -> None:
    """A finished one, and the same one as a kill in the middle of a line leaves it."""
    flags = []
    for name, value in EVALUATION.items():
        flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    amid("evaluate", "checkpoints/taid/checkpoint-4", *flags, "--output-dir", "evaluations/finished")
    Path("evaluations/half").mkdir()
    shutil.copy("evaluations/finished/settings.json", "evaluations/half")
    lines = Path("evaluations/finished/completions.jsonl").read_bytes().splitlines(keepends=True)
    Path("evaluations/half/completions.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])


def write_origin() -> None:
    results = json.loads(Path("evaluations/finished/results.json").read_text())
    cpu = f"{torch.backends.cpu.get_cpu_capability()}"
    commit = git("rev-parse", "HEAD").strip()
    write("origin.json", {"commit": commit, "versions": results["versions"], "cpu_capability": cpu})


def write(file: str, content: dict) -> None:
    Path(file).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
