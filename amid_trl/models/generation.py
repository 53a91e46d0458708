"""Prompts -> completions with `generate`: one call for a whole window, padded once, cut at the first EOS."""

import copy
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from amid_trl._trl import DynamicLayer, DynamicSlidingWindowLayer, GenerationMode, unwrap_model_for_generation
from amid_trl.data.batches import pad_rows
from amid_trl.models.heads import causal_lm, evaluating, without_router_logits
from amid_trl.models.turn_ends import turn_end
from amid_trl.quiet import hide_old_names


def generation_config_of(model: nn.Module) -> GenerationConfig:
    """The generation config that a model came with, below its adapter."""
    return causal_lm(model).generation_config


def eos_token_ids(tokenizer: PreTrainedTokenizerBase, *configs: GenerationConfig | None) -> list[int]:
    """Every id that ends a completion, without repetition.

    The tokenizer's EOS, those of the generation configs, and what the chat template writes at the end of a turn.
    """
    declared = [tokenizer.eos_token_id, *(config.eos_token_id for config in configs if config is not None)]
    ends = [token for ids in declared for token in _listed(ids)]
    return list(dict.fromkeys([*ends, *_listed(turn_end(tokenizer, ends))]))


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
    try:
        with evaluating(model), without_router_logits(model):
            yield
    finally:
        model.generation_config = own


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    prompts: list[Tensor],
    config: GenerationConfig,
    batch_size: int | None = None,
    each: int = 1,
) -> list[Tensor]:
    """One completion per prompt, the EOS included where there is one; token ids in, token ids out.

    `batch_size` bounds the prompts of one `generate` call (None: all of them at once). Dropout is off meanwhile.
    `each` equal prompts follow each other, and are read once: which changes nothing but the rounding.
    """
    ends = torch.tensor(config.eos_token_id or [], dtype=torch.long)
    device = next(model.parameters()).device
    completions: list[Tensor] = []
    generates: Any = model  # a mixin's method, which PreTrainedModel does not have
    with _only(model, config):
        for start in range(0, len(prompts), batch_size or max(1, len(prompts))):
            rows = prompts[start : start + (batch_size or len(prompts))]
            ids, mask = (padded.to(device) for padded in pad_rows(rows, config.pad_token_id, side="left"))
            group = [i // each - start // each for i in range(start, start + len(rows))]
            read = _read_once(model, ids, mask, config, group) if each > 1 else {}
            generated: Tensor = generates.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, **read
            )
            completions.extend(until_eos(row, ends) for row in generated[:, ids.shape[1] :].cpu())
    return completions


def _read_once(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, config: GenerationConfig, group: list[int]
) -> dict[str, DynamicCache]:
    """What `generate` takes in place of reading the prompts but for their last tokens; those of a group are equal.

    Nothing where that cannot be: other searches than sampling, and models that keep more than keys and values of every
    token. Whether the model is called depends on no prompt, because the processes of an engine call it together.
    """
    samples = config.get_generation_mode() in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)
    if not samples or not config.use_cache or config.cache_implementation is not None or model._is_stateful:
        return {}
    first = [group.index(one) for one in range(group[-1] + 1)]
    before = ids.shape[1] - 1
    one_token = copy.deepcopy(config)
    one_token.update(max_new_tokens=1, min_new_tokens=None, do_sample=False, return_dict_in_generate=True)
    generates: Any = model
    cache = generates.generate(
        input_ids=ids[first, : max(before, 1)],
        attention_mask=mask[first, : max(before, 1)],
        generation_config=one_token,
    ).past_key_values
    # OpenAI's first GPT keeps nothing, CPM-Ant a prefix besides, LFM2 the state of a convolution.
    if not isinstance(cache, DynamicCache) or cache.get_seq_length() != before:
        return {}
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return {}
    cache.batch_select_indices(torch.tensor(group, device=ids.device))
    return {"past_key_values": cache}


def until_eos(completion: Tensor, ends: Tensor) -> Tensor:
    """The completion up to and with its first EOS: what `generate` wrote behind it is padding."""
    positions = torch.isin(completion, ends).nonzero()
    return completion if len(positions) == 0 else completion[: int(positions[0]) + 1]


def are_clipped(completions: Iterable[Tensor], config: GenerationConfig) -> list[bool]:
    """Which completions were cut off: their last token is no EOS of `config`."""
    ends = set(config.eos_token_id or ())
    return [len(ids) == 0 or int(ids[-1]) not in ends for ids in completions]


def generate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """The most likely next token over and over, until an EOS or for `max_new_tokens`: one answer for each prompt.

    A prompt is a text, taken as it is, or a list of chat messages, to which the chat template adds the start of the
    assistant's turn. Nothing that ships with the model bends the choice (repetition penalties, banned n-grams).
    """
    ids = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    ends = eos_token_ids(tokenizer, model.generation_config)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, disable_compile=True
    )
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    completions = generate_completions(model, [ids[i] for i in order], config, batch_size)
    answers = [""] * len(ids)
    for i, completion in zip(order, completions, strict=True):
        answers[i] = str(tokenizer.decode(completion, skip_special_tokens=True)).strip()
    return answers


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> Tensor:
    if isinstance(prompt, str):
        return torch.tensor(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return torch.tensor(cast(dict[str, list[int]], encoded)["input_ids"])


def completion_seed(seed: int, step: int, process_index: int) -> int:
    """A torch seed for the completions of one window on one process: other processes draw other completions."""
    return random.Random(f"completions {seed} {step} {process_index}").getrandbits(63)


def unwrapped_for_generation(
    model: nn.Module, accelerator: Accelerator, **settings: Any
) -> AbstractContextManager[nn.Module]:
    """TRL's: gathers ZeRO-3 parameters and suspends gradient checkpointing, here without leaving a hook behind.

    transformers puts one on the embeddings whenever checkpointing is turned on, and does not take it off again.
    """
    hide_old_names()
    unwrapped: Any = accelerator.unwrap_model(model)
    inner = causal_lm(unwrapped)
    if any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()):
        inner.disable_input_require_grads()
    wrapped: Any = model
    unwrapping: Any = unwrap_model_for_generation(wrapped, accelerator, **settings)
    return unwrapping
