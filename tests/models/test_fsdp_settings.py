"""What FSDP is told to do before it shards a model; what it then does is in tests/engines/test_fsdp2.py."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from tiny import tiny_llama, tiny_tokenizer
from torch.distributed.fsdp import MixedPrecisionPolicy

from amid_trl.models.fsdp import check_fsdp


def plugin(**settings) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", **settings})


def check(plugin: FullyShardedDataParallelPlugin) -> None:
    check_fsdp(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), tiny_llama(tiny_tokenizer()))


def test_half_precision_is_that_of_the_layers_and_not_of_the_sums():
    precision = dict.fromkeys(("param_dtype", "reduce_dtype", "output_dtype"), torch.bfloat16)  # accelerate's for bf16
    half = plugin(mixed_precision_policy=MixedPrecisionPolicy(**precision))
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
