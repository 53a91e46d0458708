"""The settings and two windows of a run, written to FILE as JSON (see test_gkd.py).

With a second argument as if TRL had no GKD, and then also which tests cannot be collected:
python gkd_worker.py FILE [hidden].
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path


if sys.argv[2:] == ["hidden"]:
    sys.modules["trl.experimental.gkd"] = None  # importing it is an ImportError

import pytest
from tiny import messages_dataset, save_tiny, tiny_llama, tiny_tokenizer
from trl import SFTTrainer

from amid_trl import AMiDConfig, AMiDTrainer


def fields(config: type) -> list[list[str]]:
    """Name, default and type of every field, in their order."""
    return [
        [each.name, repr(each.default_factory() if callable(each.default_factory) else each.default), str(each.type)]
        for each in dataclasses.fields(config)
    ]


def refused(**settings) -> str:
    try:
        AMiDConfig("unused", use_cpu=True, bf16=False, **settings)
    except ValueError as error:
        return str(error)
    return ""


def found() -> dict:
    tokenizer = tiny_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        teacher = save_tiny(Path(folder, "teacher"), tiny_llama(tokenizer, seed=1, hidden_size=48), tokenizer)
        config = AMiDConfig(
            folder,
            use_cpu=True,
            bf16=False,
            lmbda=0.5,
            sampling_block_size=2,
            max_steps=2,
            max_new_tokens=6,
            per_device_train_batch_size=2,
            gradient_checkpointing=False,
            logging_steps=1,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            teacher_model_name_or_path=str(teacher),
            teacher_model_init_kwargs='{"dtype": "float32"}',
        )
        trainer = AMiDTrainer(
            tiny_llama(tokenizer),
            args=config,
            train_dataset=messages_dataset(8),
            processing_class=tokenizer,
        )
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "bases": [f"{base.__module__}.{base.__name__}" for base in AMiDTrainer.__mro__],
        "is_sft": issubclass(AMiDTrainer, SFTTrainer),
        "fields": fields(AMiDConfig),
        "json_fields": AMiDConfig._VALID_DICT_FIELDS,
        "init_kwargs": config.teacher_model_init_kwargs,
        "refused": [refused(lmbda=1.5), refused(beta=-0.1)],
        "losses": [entry["loss"] for entry in steps],
        "sources": [entry["on_policy_share"] for entry in steps],
        "weights": {name: weight.double().sum().item() for name, weight in trainer.model.named_parameters()},
        "attributes": [trainer.lmbda, trainer.beta, trainer.temperature, trainer.seq_kd],
    }


class Uncollected:
    """A plugin of pytest: the files of tests that cannot be imported."""

    def __init__(self):
        self.files: list[str] = []

    def pytest_collectreport(self, report):
        self.files += [f"{report.nodeid}: {report.longrepr}"] if report.failed else []


def uncollected() -> list[str]:
    plugin, tests = Uncollected(), str(Path(__file__).parents[1])
    options = [
        "--collect-only",
        "-qq",
        "--assert=plain",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--import-mode=importlib",
    ]
    status = pytest.main([tests, *options], [plugin])
    assert plugin.files or status == 0
    return plugin.files


if __name__ == "__main__":
    written = found()
    if sys.argv[2:] == ["hidden"]:
        written["uncollected"] = uncollected()
    Path(sys.argv[1]).write_text(json.dumps(written))
