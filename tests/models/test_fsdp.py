"""What FSDP2 has beside the other engines (test_engines.py): its settings, and when it gathers (CPU, over gloo)."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import engine_worker
import fsdp_worker
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from test_engines import ENVIRONMENT, assert_equal_figures, assert_equal_weights, figures
from tiny import save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer

from amid_trl.models.fsdp import check_fsdp


OWN = {
    "clipped": {"max_grad_norm": 0.1},
    "layers of another class": {"student": "gpt2"},
    "checkpointed by FSDP2": {"gradient_checkpointing": False, "fsdp_config": {"activation_checkpointing": True}},
    "adapter as teacher": {"teacher": "tied_adapter"},
    "layers by name": {"teacher": "gpt2", "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}},
    "loaded once": {"fsdp_config": {"cpu_ram_efficient_loading": True}},
}
WRITING = {
    # Before any loss, so that `generate` is the first to run the model.
    "gathered": {"lmbda": 1.0},
    "layer by layer": {"lmbda": 1.0, "ds3_gather_for_generation": False},
}
PRECISION = {"half": {"bf16": True}, "full": {}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp") / "models"
    engine_worker.save_models(folder)
    tokenizer = tiny_tokenizer()
    save_tiny(folder / "gpt2", tiny_gpt2(tokenizer), tokenizer)
    return folder


@pytest.fixture(scope="module")
def two(models, tmp_path_factory) -> tuple[Path, dict[str, list[dict]]]:
    """Where the cases have saved their students, and what both processes saw of every case."""
    folder, cases = tmp_path_factory.mktemp("two"), OWN | WRITING | PRECISION
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [fsdp_worker.__file__, str(models), str(folder), json.dumps(cases)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = {name: [json.loads((folder / name / f"rank{rank}.json").read_text()) for rank in (0, 1)] for name in cases}
    return folder, ranks


@pytest.mark.parametrize("case", OWN)
def test_two_processes_train_like_one(two, models, tmp_path, case):
    folder, ranks = two
    settings = {name: value for name, value in OWN[case].items() if name != "fsdp_config"}
    one = engine_worker.run(models, tmp_path, per_device_train_batch_size=4, **settings)
    for rank in ranks[case]:
        assert_equal_figures(rank, one)
    assert_equal_weights(folder / case, tmp_path)


def test_a_teacher_of_another_class_is_divided_by_its_own_layers(two):
    _, ranks = two
    for rank in ranks["layers by name"]:
        student, teacher = rank["parts"]
        assert student.count("FSDPLlamaDecoderLayer") == teacher.count("FSDPGPT2Block") == 2


def test_layers_are_gathered_once_for_a_window_or_for_each_token(two):
    _, ranks = two
    longest = [
        max(map(max, windows)) for windows in zip(*(rank["lengths"] for rank in ranks["gathered"]), strict=True)
    ]
    for gathered, layered in zip(ranks["gathered"], ranks["layer by layer"], strict=True):
        # The embedding, two layers and the head with its norm, which stays; the others again for each further token.
        assert [window["gatherings"] for window in gathered["written"]] == [4, 4, 4]
        assert [window["gatherings"] for window in layered["written"]] == [4 + 3 * (tokens - 1) for tokens in longest]
        held = {window["bytes"] for window in gathered["written"] + layered["written"]}
        assert held == {gathered["bytes"][0]}  # in parts again when the text is written
        assert {window["again"] for window in gathered["written"] + layered["written"]} == {3}


def test_half_precision_gives_nearly_the_numbers_of_full(two):
    _, ranks = two
    for half, full in zip(ranks["half"], ranks["full"], strict=True):
        for name, values in figures(full).items():
            assert figures(half)[name] == pytest.approx(values, rel=0.03), name


def plugin(**settings) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", **settings})


def check(plugin: FullyShardedDataParallelPlugin) -> None:
    check_fsdp(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), tiny_llama(tiny_tokenizer()))


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
        ({"cpu_offload": True}, "cpu_offload is not supported: .* DeepSpeed ZeRO-3 has offload_param"),
        (
            {"transformer_cls_names_to_wrap": ["LlamaDecoderLayer", "GPT2Block"]},
            "names GPT2Block, of which the student, a LlamaForCausalLM, has no module; the teacher's",
        ),
    ],
)
def test_what_is_not_supported_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check(plugin(**settings))
