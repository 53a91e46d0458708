"""Two real processes under FSDP2 give the numbers and the weights of one without it (on CPU, over gloo)."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fsdp_worker
import pytest
import torch
import zero_worker
from accelerate import FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from test_deepspeed import ENVIRONMENT, assert_equal_to_one, figures
from tiny import save_tiny, tiny_gpt2, tiny_tokenizer

from amid_trl.fsdp import check_fsdp
from amid_trl.teacher import load_causal_lm


OFF_POLICY = {
    "full, evaluated first": {"eval_on_start": True},
    "evaluated before training": {"evaluates_first": True},
    "evaluation alone": {"trains": False},
    "without checkpointing": {"gradient_checkpointing": False},
    "clipped": {"max_grad_norm": 0.1},
    "tied": {"student": "tied_student"},
    "layers of another class": {"student": "gpt2"},
    "lora": {"lora": True},
    "shared base": {"shared_base": True},
    "checkpointed by FSDP2": {"gradient_checkpointing": False, "fsdp_config": {"activation_checkpointing": True}},
    "adapter as teacher": {"teacher": "untied_adapter"},
    # The second process has nothing but shapes until it is sent its part.
    "loaded once": {"fsdp_config": {"cpu_ram_efficient_loading": True}},
}
ON_POLICY = {
    # Before any loss, so that `generate` is the first to run the model.
    "gathered": {"lmbda": 1.0},
    "layer by layer": {"lmbda": 1.0, "ds3_gather_for_generation": False},
    "lora": {"lmbda": 1.0, "lora": True},
    "teacher's text": {"seq_kd": True},
}
SAVING = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
RESUMED = {
    "whole": SAVING,
    "resumed": {**SAVING, "resumes": "whole"},
    "whole, lora": {**SAVING, "lora": True},
    "resumed, lora": {**SAVING, "lora": True, "resumes": "whole, lora"},
}


@pytest.fixture
def models(tmp_path) -> Path:
    zero_worker.save_models(tmp_path / "models")
    student = load_causal_lm(str(tmp_path / "models" / "student"), {}, distributed=False)
    get_peft_model(student, LoraConfig(**zero_worker.LORA)).save_pretrained(tmp_path / "models" / "untied_adapter")
    tokenizer = tiny_tokenizer()
    save_tiny(tmp_path / "models" / "gpt2", tiny_gpt2(tokenizer), tokenizer)
    return tmp_path / "models"


def run_two(models: Path, output_dir: Path, cases: dict[str, dict]) -> dict[str, list[dict]]:
    """What both ranks saw of every case."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [fsdp_worker.__file__, str(models), str(output_dir), json.dumps(cases)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        name: [json.loads((output_dir / name / f"rank{rank}.json").read_text()) for rank in (0, 1)] for name in cases
    }


def test_two_processes_equal_one(tmp_path, models):
    two = run_two(models, tmp_path / "two", OFF_POLICY)
    assert_equal_to_one(models, tmp_path, OFF_POLICY, two)
    for name, ranks in two.items():
        for rank in ranks:  # student, and teacher if it has a model of its own
            assert rank["shares"] == pytest.approx([0.5] * len(rank["shares"]), rel=0.01), name


def test_text_is_written_by_ranks_that_stop_at_different_lengths(tmp_path, models):
    two = run_two(models, tmp_path / "two", ON_POLICY)
    assert_equal_to_one(models, tmp_path, ON_POLICY, two)
    for name in ("gathered", "layer by layer", "lora"):
        first, second = ([max(lengths) for lengths in rank["lengths"]] for rank in two[name])
        assert first != second, name
    longest = [max(map(max, windows)) for windows in zip(*(rank["lengths"] for rank in two["gathered"]), strict=True)]
    for gathered, layered in zip(two["gathered"], two["layer by layer"], strict=True):
        # The embedding, two layers and the head with its norm, which stays; the others again for each further token.
        assert [window["gatherings"] for window in gathered["written"]] == [4, 4, 4]
        assert [window["gatherings"] for window in layered["written"]] == [4 + 3 * (tokens - 1) for tokens in longest]
        assert {window["share"] for window in gathered["written"] + layered["written"]} == {0.5}


def test_a_resumed_run_ends_like_the_uninterrupted_one(tmp_path, models):
    two = run_two(models, tmp_path, RESUMED)
    for whole, resumed in (("whole", "resumed"), ("whole, lora", "resumed, lora")):
        for before, after in zip(two[whole], two[resumed], strict=True):
            assert figures(after) == pytest.approx(figures(before), rel=1e-6)
        weights = [
            load_causal_lm(str(tmp_path / name), {}, distributed=False).state_dict() for name in (resumed, whole)
        ]
        torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_half_precision_gives_nearly_the_numbers_of_full(tmp_path, models):
    two = run_two(models, tmp_path, {"half": {"bf16": True}, "full": {}})
    for half, full in zip(two["half"], two["full"], strict=True):
        assert figures(half) == pytest.approx(figures(full), rel=0.03)


def plugin(**settings) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", **settings})


def check(plugin: FullyShardedDataParallelPlugin) -> None:
    check_fsdp(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))


def test_half_precision_is_that_of_the_layers_and_not_of_the_sums():
    half = plugin(mixed_precision_policy="bf16")
    assert half.mixed_precision_policy.output_dtype is torch.bfloat16
    check(half)
    assert half.mixed_precision_policy.output_dtype is None
    assert half.mixed_precision_policy.param_dtype is torch.bfloat16


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fsdp_version": 1}, "FSDP1 is not supported"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "SHARDED_STATE_DICT would save no model"),
    ],
)
def test_what_is_not_supported_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check(plugin(**settings))
