"""A sweep as a user writes it."""

from pathlib import Path

import yaml


BASE = {
    "model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher",
    "dataset_name": "data",
    "use_cpu": True,
    "bf16": False,
}
CONTENT = {
    "base": BASE,
    "space": {
        "assistant_alpha": {"low": -5, "high": 1},
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "divergence": ["kl", "js"],
        "text": {"own": {"lmbda": 1.0}, "given": {"lmbda": 0.0, "seq_kd": True}},
    },
    "metric": "eval_kl",
    "trials": 4,
    "budget": {"steps": 10},
    "evaluations": 4,
}


def written(tmp_path: Path, content: dict) -> Path:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file
