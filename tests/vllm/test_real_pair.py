"""The real pair with its teacher on a real vLLM server (`make test-vllm`): SmolLM2-135M-Instruct, less six layers."""

import pytest
import torch
from datasets import Dataset
from observe import logged
from real_pair import saved_teacher
from transformers import AutoModelForCausalLM
from vllm_server import needs_vllm

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.models.pruning import drop_layers
from amid_trl.training.fill_cache import cache_teacher


pytestmark = [needs_vllm, pytest.mark.timeout(3000)]
TOP_K, MAX_LENGTH = 100, 128


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """Where the teacher lies, its tokenizer, and rows."""
    place, tokenizer, rows = saved_teacher(request, tmp_path_factory.mktemp("pair"), 100, 108)
    return place, tokenizer, Dataset.from_list(rows)


def opened(pair, folder, **settings) -> AMiDTrainer:
    place, tokenizer, rows = pair
    return AMiDTrainer(
        drop_layers(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32), range(16, 22)),
        args=AMiDConfig(
            str(folder),
            **{"use_cpu": True, "bf16": False, "max_steps": 2, "logging_steps": 1, "report_to": []},
            **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "no"},
            **{"objective": "kd", "learning_rate": 1e-4, "optim": "sgd", "disable_tqdm": True},
            **{"max_length": MAX_LENGTH, "max_new_tokens": 16, "teacher_top_k": TOP_K, **settings},
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def test_it_trains_as_with_the_same_tokens_out_of_the_teacher_in_memory(vllm, pair, tmp_path):
    """Both know the hundred likeliest tokens and the mass of all others, one from vLLM's passes, one from ours."""
    bounds = ("--dtype", "float32", "--max-logprobs", str(TOP_K), "--max-model-len", str(MAX_LENGTH + 1))
    url, cache = vllm.serve(pair[0], *bounds), str(tmp_path / "cache")
    writer = opened(pair, tmp_path / "writer", lmbda=0.0, teacher_model_name_or_path=pair[0])
    cache_teacher(writer, cache, TOP_K, "float32")
    runs = []
    for teacher in ({"teacher_model_server_url": url, "teacher_server_patience": 900.0}, {"teacher_cache": cache}):
        runs.append(opened(pair, tmp_path / "run", lmbda=0.0, **teacher))
        runs[-1].train()
    served, cached = runs
    for name in ("loss", "kl", "teacher_tail_mass", "grad_norm"):
        assert logged(served, name) == pytest.approx(logged(cached, name), rel=1e-3), name
    assert all(0 < mass < 0.3 for mass in logged(served, "teacher_tail_mass"))


def test_it_reads_what_the_student_has_just_written(vllm, pair, tmp_path):
    """On the student's text, beside the whole teacher in memory."""
    bounds = ("--dtype", "float32", "--max-logprobs", str(TOP_K), "--max-model-len", str(MAX_LENGTH + 1))
    url = vllm.serve(pair[0], *bounds)
    runs = []
    for teacher in (
        {"teacher_model_server_url": url, "teacher_server_patience": 900.0},
        {"teacher_model_name_or_path": pair[0]},
    ):
        runs.append(opened(pair, tmp_path / "run", lmbda=1.0, top_k=1, **teacher))
        runs[-1].train()
    served, memory = runs
    assert logged(served, "nll") == pytest.approx(logged(memory, "nll"), rel=1e-2), "they wrote the same"
    for name in ("kl", "loss"):
        shares = [a / b for a, b in zip(logged(served, name), logged(memory, name), strict=True)]
        print(f"{name} of {TOP_K} tokens and the rest / of the whole vocabulary: {shares}")
        assert all(0.8 < share <= 1 + 1e-4 for share in shares), "outcomes put together are never further apart"
