"""Who writes a window's completions: a model of the run, by its own `generate`, or the student in a vLLM engine."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from amid_trl import _trl
from amid_trl.config import SAMPLING_FIELDS, AMiDConfig
from amid_trl.fsdp import writing
from amid_trl.generation import eos_token_ids, generate_completions, sampling_config, until_eos
from amid_trl.sampling import completion_seed


class Writer(Protocol):
    """Prompts -> completions; all processes have to ask, each with prompts of its own."""

    config: GenerationConfig

    def __call__(self, prompts: list[Tensor], step: int) -> list[Tensor]:
        """One completion per prompt, the EOS included where there is one, for optimizer step `step`."""
        ...


def writer_config(
    args: AMiDConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    model: PreTrainedModel,
    *others: GenerationConfig,
    greedy: bool = False,
) -> GenerationConfig:
    """How `model` writes in this run; completions end at its EOS tokens, the tokenizer's, and those of `others`.

    What is `greedy` has the run's length and cache, and its most likely tokens.
    """
    settings = {name: getattr(args, name) for name in SAMPLING_FIELDS}
    if greedy:
        settings = {name: settings[name] for name in ("max_new_tokens", "cache_implementation")} | {"do_sample": False}
    elif args.use_vllm:
        del settings["generation_kwargs"]  # vLLM's own, for its engine alone
    return sampling_config(
        eos_token_ids=eos_token_ids(tokenizer, *others, model.generation_config),
        pad_token_id=tokenizer.pad_token_id,
        padded_ids=range(vocabulary, model.config.get_text_config().vocab_size),
        **settings,
    )


def require_vllm() -> None:
    """Refuse a run that needs vLLM where there is none, before anything is loaded."""
    if not _trl.is_vllm_available():
        raise ImportError("use_vllm=True needs vLLM: pip install 'amid_trl[vllm]'")


@dataclass(frozen=True)
class ModelWriter:
    """A model of the run, with the weights that it has by then."""

    wrapped: Callable[[], nn.Module]  # as the engine has wrapped it
    config: GenerationConfig
    args: AMiDConfig
    accelerator: Accelerator

    def __call__(self, prompts: list[Tensor], step: int) -> list[Tensor]:
        """The seed is that of the step and the process; the random state of training stays as it is."""
        device = self.accelerator.device
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            _trl.unwrap_model_for_generation(
                self.wrapped(),
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self.accelerator.autocast(),
        ):
            torch.manual_seed(completion_seed(self.args.seed, step, self.accelerator.process_index))
            settings = (prompts, self.config, self.args.generation_batch_size)
            write = partial(generate_completions, _trl.causal_lm(model), *settings)
            return writing(model, write, self.accelerator, gathers=self.args.ds3_gather_for_generation)


class VLLMWriter:
    """The student in a vLLM engine, which gets its weights anew for every window (TRL's VLLMGeneration).

    The engine draws with a generator of its own, so that a resumed run writes other completions.
    """

    def __init__(
        self,
        student: nn.Module,
        config: GenerationConfig,
        args: AMiDConfig,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.config = config
        self._ends = torch.tensor(config.eos_token_id or [], dtype=torch.long)
        self._engine = _trl.vllm_engine(
            model=student,
            accelerator=accelerator,
            processing_class=tokenizer,
            mode=args.vllm_mode,
            structured_outputs_regex=args.vllm_structured_outputs_regex,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=args.window_rows * args.vllm_tensor_parallel_size,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            trust_remote_code=args.trust_remote_code,
            repetition_penalty=args.repetition_penalty,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p or 0.0,
            max_completion_length=args.max_new_tokens,
            logprobs=None,  # the loss reads the models, not the engine
            generation_kwargs={**_vllm_endings(config), **(args.generation_kwargs or {})},
        )

    def __call__(self, prompts: list[Tensor], step: int) -> list[Tensor]:
        """One request for all prompts, each by itself: rows of one prompt share the engine's prefix cache."""
        self._engine.sync_weights()
        _, completions, *_ = self._engine.generate([ids.tolist() for ids in prompts], images=None, num_generations=1)
        if len(completions) != len(prompts):
            raise ValueError(f"vLLM wrote {len(completions)} completions for {len(prompts)} prompts")
        return [until_eos(torch.tensor(ids, dtype=torch.long), self._ends) for ids in completions]


def _vllm_endings(config: GenerationConfig) -> dict[str, Any]:
    """What ends a completion and what is never written, in the words of vLLM's SamplingParams."""
    settings: dict[str, Any] = {"stop_token_ids": list(config.eos_token_id or [])}
    if config.suppress_tokens:
        settings["logit_bias"] = dict.fromkeys(config.suppress_tokens, -100.0)  # its lowest
    return settings
