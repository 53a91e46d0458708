"""Prompts -> completions with `generate`: one call for a whole window, padded once, cut at the first EOS."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from amid_trl.batches import pad_rows


def eos_token_ids(tokenizer: PreTrainedTokenizerBase, *configs: GenerationConfig | None) -> list[int]:
    """Every id that ends a completion: the tokenizer's EOS and those of the generation configs, without repetition."""
    declared = [tokenizer.eos_token_id, *(config.eos_token_id for config in configs if config is not None)]
    return list(dict.fromkeys(token for ids in declared for token in _listed(ids)))


def _listed(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else ids


def sampling_config(
    *,
    max_new_tokens: int,
    eos_token_ids: list[int],
    pad_token_id: int,
    padded_ids: Iterable[int] = (),
    generation_kwargs: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> GenerationConfig:
    """Settings for sampling with the KV cache on. `padded_ids` have a row in the head but no token: never emitted.

    `sampling` are GenerationConfig's own (temperature, top_p, top_k, min_p, repetition_penalty, ...), and
    `generation_kwargs` override everything, as in TRL.
    """
    generation_kwargs = dict(generation_kwargs or {})
    suppressed = sorted({*padded_ids, *(generation_kwargs.pop("suppress_tokens", None) or ())})
    settings = {
        "max_new_tokens": max_new_tokens,
        "do_sample": True,
        "use_cache": True,
        "eos_token_id": eos_token_ids or None,
        "pad_token_id": pad_token_id,
        "suppress_tokens": suppressed or None,
        "disable_compile": True,
        **sampling,
        **generation_kwargs,
    }
    settings["eos_token_id"] = _listed(settings["eos_token_id"]) or None
    return GenerationConfig(**settings)


@contextmanager
def _only(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """`model.generate` without its own generation config, from which transformers would fill every unset value.

    A repetition penalty or a banned n-gram that ships with a model would otherwise bend the student's distribution.
    """
    own, model.generation_config = model.generation_config, config
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    prompts: list[Tensor],
    config: GenerationConfig,
    batch_size: int | None = None,
) -> list[Tensor]:
    """One completion per prompt, the EOS included where there is one; token ids in, token ids out.

    `batch_size` bounds the prompts of one `generate` call (None: all of them at once). Dropout is off meanwhile.
    """
    ends = torch.tensor(config.eos_token_id or [], dtype=torch.long)
    device = next(model.parameters()).device
    completions: list[Tensor] = []
    with _only(model, config):
        for start in range(0, len(prompts), batch_size or max(1, len(prompts))):
            rows = prompts[start : start + (batch_size or len(prompts))]
            ids, mask = pad_rows(rows, config.pad_token_id, side="left")
            generated = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
            completions.extend(until_eos(row, ends) for row in generated[:, ids.shape[1] :].cpu())
    return completions


def until_eos(completion: Tensor, ends: Tensor) -> Tensor:
    """The completion up to and with its first EOS: what `generate` wrote behind it is padding."""
    positions = torch.isin(completion, ends).nonzero()
    return completion if len(positions) == 0 else completion[: int(positions[0]) + 1]
