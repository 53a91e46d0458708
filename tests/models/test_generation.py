"""Equal prompts that follow each other are read once, and everything that is written stays as it was."""

import pytest
import torch
from families import NOT_WRITTEN, REFUSED, all_families, family_model
from torch import Tensor
from transformers import PreTrainedModel

from amid_trl.models.generation import generate_completions, sampling_config


EACH = 3
# What cannot be read ahead: their cache holds more than the keys and values of every token, or nothing.
READ_AGAIN = {
    *(
        "axk2",
        "bailing_hybrid",
        "bamba",
        "cpmant",
        "deepseek_v32",
        "deepseek_v4",
        "dots3_note_text",
        "falcon_h1",
        "falcon_mamba",
        "glm_moe_dsa",
        "granitemoehybrid",
        "hy_v4",
    ),
    *(
        "inkling2_text",
        "inkling_text",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "mamba",
        "mamba2",
        "nemotron_h",
    ),
    *("olmo_hybrid", "openai-gpt", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv"),
    *("xlm", "xlnet", "zamba", "zamba2", "zaya"),
}
FEW = ["cpmant", "falcon_h1", "gemma2", "gpt2", "llama", "mamba", "openai-gpt", "opt"]
FAMILIES = [
    name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
    for name in all_families()
    if name not in REFUSED and name not in NOT_WRITTEN
]


def prompts(*lengths: int) -> list[Tensor]:
    """EACH equal ones of every length."""
    drawn = torch.Generator().manual_seed(0)
    return [ids for length in lengths for ids in [torch.randint(5, 60, (length,), generator=drawn)] * EACH]


def written(
    model: PreTrainedModel, asked: list[Tensor], each: int, batch_size: int | None = None, **settings
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The completions, and the (rows, tokens) of every batch that the model has read meanwhile."""
    read = []
    embeds = model.get_input_embeddings().register_forward_hook(
        lambda _, given, __: read.append(tuple(given[0].shape))
    )
    config = sampling_config(max_new_tokens=6, eos_token_ids=[4], pad_token_id=0, generation_kwargs=settings)
    torch.manual_seed(1)
    found = [ids.tolist() for ids in generate_completions(model, asked, config, batch_size, each)]
    embeds.remove()
    return found, read


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_it_writes_of_prompts_read_again(tokenizer, family):
    model, asked = family_model(family, tokenizer, seed=0), prompts(12, 7)
    written(model, asked[:1], 1)  # BigBird draws more in its first call
    once, read = written(model, asked, EACH)
    again, read_again = written(model, asked, 1)
    assert once == again and len({tuple(ids) for ids in once}) > 2
    if family in READ_AGAIN:
        assert read_again in (read, read[1:])
    elif read:  # not all look their tokens up where we look
        assert read[:2] == [(2, 11), (6, 1)] and read_again[0] == (6, 12)


def test_a_bound_on_a_call_may_cut_a_group(tokenizer):
    model, asked = family_model("llama", tokenizer, seed=0), prompts(9, 5, 8)
    once, read = written(model, asked, EACH, batch_size=4)
    again, _ = written(model, asked, 1, batch_size=4)
    assert once == again
    assert [rows for rows, tokens in read if tokens > 1] == [2, 2, 1]


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_other_searches_and_caches_read_every_row(tokenizer, settings):
    model, asked = family_model("llama", tokenizer, seed=0), prompts(6, 9)
    once, read = written(model, asked, EACH, **settings)
    assert once == written(model, asked, 1, **settings)[0]
    assert max(read)[0] >= 6 and (2, 8) not in read


def test_prompts_of_one_token_have_nothing_to_read_ahead(tokenizer):
    model, asked = family_model("llama", tokenizer, seed=0), prompts(1, 1)
    assert written(model, asked, EACH)[0] == written(model, asked, 1)[0]


def test_a_ban_on_repetitions_sees_the_prompt(tokenizer):
    model, asked = family_model("llama", tokenizer, seed=0), prompts(12, 7)
    settings = {"no_repeat_ngram_size": 1, "suppress_tokens": [*range(50), *range(60, 360)]}
    once, _ = written(model, asked, EACH, **settings)
    assert once == written(model, asked, 1, **settings)[0]
    assert not any({*prompt.tolist()} & {*ids} for prompt, ids in zip(asked, once, strict=True))
