"""Who writes a window's completions: a model of the run, by its own `generate`, or the student in a vLLM engine."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from amid_trl._trl import is_vllm_available, vllm_engine
from amid_trl.fields import json_dict
from amid_trl.models.fsdp import writing
from amid_trl.models.generation import (
    completion_seed,
    eos_token_ids,
    generate_completions,
    sampling_config,
    until_eos,
    unwrapped_for_generation,
)
from amid_trl.models.heads import causal_lm
from amid_trl.run import Run
from amid_trl.sources.fields import SAMPLING_FIELDS, SourceFields
from amid_trl.sources.source import Source


class Writer(Protocol):
    """Prompts -> completions; all processes have to ask, each with prompts of its own."""

    @property
    def config(self) -> GenerationConfig:
        """How it writes."""
        ...

    def __call__(self, prompts: list[Tensor], step: int) -> list[Tensor]:
        """One completion per prompt, the EOS included where there is one, for optimizer step `step`."""
        ...


def open_writers(
    run: Run[SourceFields],
    student: nn.Module,
    wrapped_student: Callable[[], nn.Module],
    teacher: nn.Module | None,
    student_generation: GenerationConfig,
) -> dict[Source, Writer]:
    """Who writes in this run: the student, or its vLLM engine, and with `seq_kd` the teacher.

    `student_generation` is the generation config that the student came with.
    """
    config = writer_config(run, student, student_generation)
    if run.args.use_vllm:
        writers: dict[Source, Writer] = {"student": VLLMWriter(run, student, config)}
    else:
        writers = {"student": ModelWriter(run, wrapped_student, config, each=run.args.num_generations)}
    if run.args.seq_kd and teacher is not None:
        writers["teacher"] = ModelWriter(run, lambda: teacher, writer_config(run, teacher, student_generation))
    return writers


def open_greedy_writer(
    run: Run[SourceFields],
    student: nn.Module,
    wrapped_student: Callable[[], nn.Module],
    student_generation: GenerationConfig,
) -> Writer:
    """The student's most likely tokens, for evaluations."""
    return ModelWriter(run, wrapped_student, writer_config(run, student, student_generation, greedy=True))


def writer_config(
    run: Run[SourceFields], model: nn.Module, *others: GenerationConfig, greedy: bool = False
) -> GenerationConfig:
    """How `model` writes in this run; completions end at its EOS tokens, the tokenizer's, and those of `others`.

    What is `greedy` has the run's length and cache, and its most likely tokens.
    """
    args, tokenizer = run.args, run.tokenizer
    unwrapped: Any = run.accelerator.unwrap_model(model)
    base = causal_lm(unwrapped)
    settings: dict[str, Any] = {name: getattr(args, name) for name in SAMPLING_FIELDS}
    if greedy:
        settings = {name: settings[name] for name in ("max_new_tokens", "cache_implementation")} | {"do_sample": False}
    elif args.use_vllm:
        del settings["generation_kwargs"]  # vLLM's own, for its engine alone
    return sampling_config(
        eos_token_ids=eos_token_ids(tokenizer, *others, base.generation_config),
        pad_token_id=cast(int, tokenizer.pad_token_id),
        padded_ids=[*run.renamed.ids, *range(run.vocabulary, base.config.get_text_config().vocab_size)],
        **settings,
    )


def require_vllm() -> None:
    """Refuse a run that needs vLLM where there is none, before anything is loaded."""
    if not is_vllm_available():
        raise ImportError("use_vllm=True needs vLLM: pip install 'amid_trl[vllm]'")


@dataclass(frozen=True)
class ModelWriter:
    """A model of the run, with the weights that it has by then."""

    run: Run[SourceFields]
    wrapped: Callable[[], nn.Module]  # as the engine has wrapped it
    config: GenerationConfig
    each: int = 1  # so many equal prompts follow each other

    def __call__(self, prompts: list[Tensor], step: int) -> list[Tensor]:
        """The seed is that of the step and the process; the random state of training stays as it is."""
        args, accelerator = self.run.args, self.run.accelerator
        device = accelerator.device
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            unwrapped_for_generation(
                self.wrapped(),
                accelerator,
                gather_deepspeed3_params=args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            ) as model,
            accelerator.autocast(),
        ):
            torch.manual_seed(completion_seed(args.seed, step, accelerator.process_index))
            settings = (prompts, self.config, args.generation_batch_size, self.each)
            write = partial(generate_completions, causal_lm(model), *settings)
            return writing(model, write, accelerator, gathers=args.ds3_gather_for_generation)


class VLLMWriter:
    """The student in a vLLM engine, which gets its weights anew for every window (TRL's VLLMGeneration).

    The engine draws with a generator of its own, so that a resumed run writes other completions.
    """

    def __init__(self, run: Run[SourceFields], student: nn.Module, config: GenerationConfig):
        args, self.config = run.args, config
        self._ends = torch.tensor(config.eos_token_id or [], dtype=torch.long)
        self._engine = vllm_engine(
            model=student,
            accelerator=run.accelerator,
            processing_class=run.tokenizer,
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
            generation_kwargs={**_vllm_endings(config), **json_dict(args.generation_kwargs)},
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
