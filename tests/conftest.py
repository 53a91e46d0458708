"""Settings and fixtures shared by all tests; the builders are in tests/support/tiny.py."""

import gc
import json
import os
import shutil


# For the processes that tests start as well: tiny models are slower on several threads, and not equal to the last bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from evaluating import ROWS, SHORT, jsonl, taught
from tiny import messages_dataset, save_tiny, tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.choosing.grid import Grid
from amid_trl.choosing.landscape import landscape
from amid_trl.choosing.report import results
from amid_trl.evaluation.evaluate import evaluate
from amid_trl.maths.kernel import _compiled
from amid_trl.maths.linear import Head, States


def pytest_collection_finish() -> None:
    """What is imported stays: `train` collects garbage, and walking all of that takes longer than a tiny run."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test with the mark `sampled(n)` one in n stays quick, and the others are slow.

    What has the mark `gpu` is skipped without one.
    """
    seen: Counter[str] = Counter()
    for item in items:
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if (mark := item.get_closest_marker("sampled")) is not None:
            name = item.nodeid.partition("[")[0]
            if seen[name] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed every test with its fixtures, so that what PEFT or a test draws is the same whatever ran before."""
    set_seed(0)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of this test's own: trainers and tests may change it."""
    return tiny_tokenizer()


@pytest.fixture
def student(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny_llama(tokenizer, seed=0)


@pytest.fixture
def teacher(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny_llama(tokenizer, seed=1, hidden_size=48, intermediate_size=96)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its tokenizer, for code that takes a path. Read only."""
    tokenizer = tiny_tokenizer()
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", tiny_llama(tokenizer, seed=2), tokenizer)


@pytest.fixture
def train(tmp_path, tokenizer, student, teacher):
    """Build a trainer on tiny models; keyword arguments are AMiDConfig's (`...`: not given), or the trainer's own."""

    def build(*, model=None, teacher_model=None, has_teacher=True, train_dataset=None, **settings) -> AMiDTrainer:
        own = ("eval_dataset", "peft_config", "data_collator", "compute_metrics", "quantization_config")
        used = settings.pop("processing_class", tokenizer)
        extra = {name: settings.pop(name) for name in own if name in settings}
        if isinstance(settings.get("pretrain_dataset"), Dataset):  # a field of the same name takes a path
            extra["pretrain_dataset"] = settings.pop("pretrain_dataset")
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "max_new_tokens": 6,
            "lmbda": 0.0,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
        }
        return AMiDTrainer(
            model if model is not None else student,
            teacher_model if teacher_model is not None else teacher if has_teacher else None,
            AMiDConfig(**{name: value for name, value in {**defaults, **settings}.items() if value is not ...}),
            train_dataset=train_dataset if train_dataset is not None else messages_dataset(8),
            processing_class=used,
            **extra,
        )

    return build


@pytest.fixture
def compiling(monkeypatch, caplog):
    """The loss is compiled whatever the vocabulary, and the test fails if that did not work."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr("amid_trl.maths.kernel.COMPILE_FROM_VOCAB", 0)
    monkeypatch.setattr("amid_trl.maths.ahead.begin", lambda wanted: None)  # which takes another process
    _compiled.cache_clear()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    assert not [record for record in caplog.get_records("call") if record.name == "amid_trl.maths.kernel"]


# ---- amid-trl evaluate ----


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    folder, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer()
    student = taught(tiny_llama(tokenizer, seed=0), steps=1)
    teacher = taught(tiny_llama(tokenizer, seed=1, hidden_size=48, intermediate_size=96), steps=3)
    return {
        "student": str(save_tiny(folder / "student", student, tokenizer)),
        "teacher": str(save_tiny(folder / "teacher", teacher, tokenizer)),
    }


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> str:
    return jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory, models, rows_file) -> tuple[dict, Path]:
    """One evaluation with a teacher, and its folder."""
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    evaluate(models["student"], folder, replace(SHORT, evaluation_set=rows_file), teacher=models["teacher"])
    return json.loads((folder / "results.json").read_text()), folder


# ---- amid-trl landscape ----


@pytest.fixture(scope="session")
def measured() -> dict:
    """What landscape.json holds, of a small grid at made-up states."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        States(torch.randn(30, 6, generator=generator), Head(torch.randn(11, 6, generator=generator)))
        for _ in range(2)
    )
    grid = Grid(("kl", "ab"), ("pr", "pq"), (-5.0, 0.5, 1.0), (0.1, 1.0), (1.0, 2.0))
    return results(landscape(student, teacher, grid, tokens=20, rows=torch.arange(30) // 5))
