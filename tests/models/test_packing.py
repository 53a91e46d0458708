"""Rows without padding: how they lie together, and in which families each is read as it is alone."""

import math
import random
from pathlib import Path

import pytest
import torch
from families import NOT_APART, OWN_LENGTHS, REFUSED, all_families, family_model
from tiny import tiny_llama, tiny_tokenizer

from amid_trl.models.heads import backbone_of, states_at
from amid_trl.models.own_logits import check_rows_apart
from amid_trl.models.packing import best_bins, is_flash, one_bin, pack


# Tried each time: windows, chunks, biases, learned positions and experts; and what is refused, by recurrence or by a
# mask that knows no positions.
FEW = [
    *("cohere", "dbrx", "gemma2", "gpt2", "gpt_neo", "llama4_text", "minicpm3", "modernbert-decoder", "qwen3_moe"),
    *("bert", "bloom", "gpt_oss", "lfm2_moe", "mamba", "opt", "qwen3_next", "recurrent_gemma"),
]
FAMILIES = [
    name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
    for name in all_families()
    if name not in REFUSED and name not in OWN_LENGTHS
]


def rows_of(lengths, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids, mask


# ---- How they lie together ----


def test_every_token_has_a_slot_and_positions_begin_anew():
    ids, mask = rows_of([4, 2, 3])
    mask[-1] = mask[-1].flip(0)  # padded on the left
    packed = pack(ids, mask, lambda lengths: [[0], [2, 1]])
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    first, second, last = (row[seen] for row, seen in zip(ids, mask.bool(), strict=True))
    assert torch.equal(packed.input_ids[0, :4], first)
    assert torch.equal(packed.input_ids[1], torch.cat([last, second]))
    back = packed.unpacked(packed.input_ids[..., None].float())[..., 0]
    assert torch.equal(back, (ids * mask).float())


def test_one_packed_row_has_no_padding():
    ids, mask = rows_of([4, 2, 3])
    packed = pack(ids, mask, one_bin)
    assert packed.input_ids.shape == (1, 9)
    assert torch.equal(packed.input_ids[0], ids[mask.bool()])


@pytest.mark.parametrize("reach", [1.0, 500.0, math.inf])
def test_a_pass_never_costs_more_than_a_padded_one_and_holds_each_row_once(reach):
    drawn = random.Random(0)
    for _ in range(200):
        lengths = [drawn.randint(1, 300) for _ in range(drawn.randint(1, 12))]
        bins = best_bins(lengths, reach)
        assert sorted(row for members in bins for row in members) == [*range(len(lengths))]
        width = max(sum(lengths[row] for row in members) for members in bins)
        cost = len(bins) * width * (1 + width / reach)
        assert cost <= len(lengths) * max(lengths) * (1 + max(lengths) / reach)


def test_rows_lie_in_one_where_attention_costs_nothing_and_apart_where_it_costs_all():
    lengths = [8, 8, 8, 8]
    assert best_bins(lengths, math.inf) == [[0, 1, 2, 3]]
    assert sorted(best_bins(lengths, 1e-3)) == [[0], [1], [2], [3]]


# ---- Families ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_reads_each_row_as_it_is_alone_or_is_refused_by_name(tokenizer, family):
    model = family_model(family, tokenizer)
    name = type(model).__name__
    if family in NOT_APART:
        with pytest.raises(
            ValueError, match=f"padding_free=True, but the teacher, a {name}, does not tell rows apart"
        ):
            check_rows_apart(model, "teacher")
        return
    check_rows_apart(model, "teacher")
    ids, mask = rows_of([23, 6, 17, 9])
    results = []
    for padding_free in (False, True):
        model.zero_grad()
        states = states_at(model, ids, mask, mask.bool(), padding_free)
        states.square().mean().backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        results.append([states.detach(), *gradients])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_the_families_that_are_refused_stand_in_the_docs(tokenizer):
    said = Path(__file__).parents[2].joinpath("docs", "trainer.md").read_text()
    for name in NOT_APART.values():
        assert f"`{name}`" in said, name
    assert set(NOT_APART) < set(all_families())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_half_precision_tells_a_leak_from_rounding(tokenizer, attention, dtype):
    check_rows_apart(tiny_llama(tokenizer, attn_implementation=attention).to(dtype), "student")
    with pytest.raises(ValueError, match="changes by"):
        check_rows_apart(family_model("opt", tokenizer, attn_implementation=attention).to(dtype), "student")


def test_a_model_that_cannot_run_yet_is_not_tried(tokenizer, monkeypatch):
    model = tiny_llama(tokenizer)
    monkeypatch.setattr(backbone_of(model), "forward", lambda **_: 1 / 0)
    assert not check_rows_apart(model, "student")


def test_flash_attention_gets_one_row():
    model = tiny_llama(tiny_tokenizer())
    assert not is_flash(model)
    for name in ("flash_attention_2", "kernels-community/vllm-flash-attn3"):
        model.config._attn_implementation_internal = name  # not the setter, which asks for the package
        assert is_flash(model)
