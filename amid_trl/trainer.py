"""AMiDTrainer: TRL's trainer around an Objective.

It is a GKDTrainer to every script that asks, but runs none of GKDTrainer's code (docs/trainer.md says why): PEFT,
saving and logging are SFTTrainer's, and what distillation adds lives in the modules that are wired together here.
"""

import logging
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction
from trl import SFTTrainer
from trl.experimental.gkd import GKDTrainer

from amid_trl import _trl
from amid_trl.batches import DistillationCollator, completion_batch, deal_by_length, window_prompts
from amid_trl.card import PAPER, objective_card
from amid_trl.checkpoint import load_state, save_state
from amid_trl.completions import CompletionLog
from amid_trl.config import SAMPLING_FIELDS, AMiDConfig, data_settings, own_copy
from amid_trl.data import prepare_dataset
from amid_trl.generation import eos_token_ids, generate_completions, sampling_config
from amid_trl.linear import Head, linear_token_loss
from amid_trl.metrics import Means
from amid_trl.run_objective import RunObjective
from amid_trl.sampling import Source, completion_seed
from amid_trl.sources import Sources
from amid_trl.teacher import (
    check_models,
    common_positions,
    common_vocabulary,
    disable_dropout,
    freeze,
    load_student,
    load_teacher,
    load_tokenizer,
    merge_adapter,
    place,
)
from amid_trl.token_loss import FIGURES
from amid_trl.validation import check_evaluation_set


logger = logging.getLogger(__name__)

# Logged as means over trained tokens. The last two figures are not: TAID's loss and the student's token, a prediction.
TOKEN_MEANS = FIGURES[:-2]
WINDOW_MEANS = ("on_policy_share", "replay_share", "completions/mean_length", "completions/clipped_ratio")


class AMiDTrainer(GKDTrainer):
    """Distil a teacher into a student through an α-mixture assistant (AMiD, arXiv 2510.15982).

    Args:
        model (`str`, `~transformers.PreTrainedModel` or `~peft.PeftModel`):
            The student: a name, a path (of a model or of an adapter, which is trained further), or a model.
        teacher_model (`str`, `~transformers.PreTrainedModel` or `~peft.PeftModel`, *optional*):
            The teacher, likewise; an adapter is kept beside its base, not merged. By default
            `args.teacher_model_name_or_path`. Frozen in place.
        args ([`AMiDConfig`], *optional*):
            The settings. Never changed: the trainer works on a copy, `trainer.args`.
        data_collator (`DataCollator`, *optional*):
            By default rows are prepared by `amid_trl.data`. A collator of your own gets the raw rows and returns
            `input_ids`, `attention_mask`, `labels` (-100 = not trained) and, for generated text, left-padded `prompts`
            and `prompt_attention_mask`.
        train_dataset, eval_dataset:
            Any of TRL's text formats (docs/data.md).
        processing_class (`~transformers.PreTrainedTokenizerBase`, *optional*):
            The tokenizer, by default the student's.
        compute_metrics (`Callable`, *optional*):
            Gets the student's most likely token ids as `predictions` (batch, tokens), -100 where nothing is trained,
            never logits.
        callbacks, optimizers, peft_config, formatting_func, quantization_config:
            As in [`~trl.SFTTrainer`].
    """

    loss_is_scaled_for_ga = True

    _tag_names = ["trl", "amid"]
    _name = "AMiD"
    _paper = PAPER

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        teacher_model: PreTrainedModel | nn.Module | str | None = None,
        args: AMiDConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: Any | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
    ):
        args = own_copy(args, model)
        if preprocess_logits_for_metrics is not None:
            raise ValueError("preprocess_logits_for_metrics has nothing to process: logits are never held as a whole")
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        if model is None or teacher_model is None:
            missing = "model" if model is None else "teacher_model (or args.teacher_model_name_or_path)"
            raise ValueError(f"{missing} is missing: pass a name, a path or a model")

        set_seed(args.seed)
        revision = (args.model_init_kwargs or {}).get("revision")
        student = load_student(model, args, quantization_config)
        teacher = load_teacher(teacher_model, args)
        tokenizer = processing_class or load_tokenizer(
            student, model, revision=revision, trust_remote_code=args.trust_remote_code
        )
        teacher_tokenizer = load_tokenizer(
            teacher, teacher_model, revision=args.teacher_model_revision, trust_remote_code=args.trust_remote_code
        )
        check_models(student, teacher, tokenizer, teacher_tokenizer, adapter_follows=peft_config is not None)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

        check_evaluation_set(args, eval_dataset)
        if is_peft_model(student) and peft_config is not None:
            folder = Path(args.output_dir, "merged_base")
            student = merge_adapter(student, tokenizer, folder, saves=args.process_index == 0)
        self._student_generation_config = _trl.causal_lm(student).generation_config
        self._positions = common_positions(student, teacher)
        if data_collator is None and (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise ValueError("dataset_kwargs={'skip_prepare_dataset': True} needs a data_collator that takes raw rows")
        if data_collator is not None:
            args.remove_unused_columns = False
            args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}

        super(GKDTrainer, self).__init__(
            student,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        # Only now: chat_template_path may have given the tokenizer new tokens and the student rows for them.
        self.vocabulary = common_vocabulary(self.model, teacher, tokenizer)
        if data_collator is None:
            self.data_collator = DistillationCollator(tokenizer.pad_token_id, args.pad_to_multiple_of)
        self.model_accepts_loss_kwargs = True  # the loss divides by the window's token count, whatever the model takes
        self._loss_shifts_labels = True
        if args.disable_dropout:
            disable_dropout(self.model)
        if self.aux_loss_enabled:
            logger.warning("The load-balancing loss of this mixture-of-experts student is not part of the loss.")
        _trl.announce_head(self.model)
        self.teacher_model = place(freeze(teacher), self.accelerator)

        self.lmbda, self.beta, self.temperature, self.seq_kd = args.lmbda, args.beta, args.temperature, args.seq_kd
        self.generation_config = self._sampling_config("student")
        self._sources, self._run_objective = Sources(args, self.accelerator), RunObjective(args, self.accelerator)
        self.objective = self._run_objective.current
        self._train_means = Means((*TOKEN_MEANS, *WINDOW_MEANS), self.accelerator.device)
        self._eval_means = Means(TOKEN_MEANS, self.accelerator.device)
        self._completion_log = (
            CompletionLog(args.output_dir, tokenizer, args.num_completions_to_print) if args.log_completions else None
        )

    # ---- Before training ----

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        settings = data_settings(
            args,
            positions=self._positions,
            evaluates=dataset_name != "train",
            eos_token_ids=eos_token_ids(processing_class, self._student_generation_config),
            formatting_func=formatting_func,
        )
        with _trl.global_then_local_main_first():
            rows = prepare_dataset(dataset, processing_class, settings, name=dataset_name)
            return rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "prompt_ids"]

    # ---- A window: the micro-batches of one optimizer step ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch a window, let its source write the completions, then count the trained tokens of all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        step, steps = self.state.global_step, self.state.max_steps
        if self._sources.needs_evaluation:
            self._evaluate(None, None, skip_scheduler=True)
        self.objective = self._run_objective.advance(step / steps)
        source = self._sources.choose(step, steps)
        if source != "dataset" and batches:
            batches = self._written_by(source, batches)
        if isinstance(self.data_collator, DistillationCollator):
            batches = deal_by_length(batches, self._tokenizer.pad_token_id, self.args.pad_to_multiple_of)
        for batch in batches:
            batch["source"] = source
        for name, share in self._sources.shares(source).items():
            self._train_means.add(name, share, 1)
        return batches, self._get_num_items_in_batch(batches, device)

    def _written_by(self, source: Source, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        if source == "replay":
            prompts, completions = self._sources.replayed(sum(len(batch["input_ids"]) for batch in batches))
        else:
            prompts = window_prompts(batches, writer=source)
            config = self._sampling_config(source)
            completions = self._generate(source, prompts, config)
            self._record_completions(source, prompts, completions, config)
        if source == "student":
            self._sources.remember(prompts, completions)
        window, start = [], 0
        for batch in batches:
            rows = slice(start, start := start + len(batch["input_ids"]))
            pad = (self._tokenizer.pad_token_id, self.args.pad_to_multiple_of)
            window.append(self._prepare_inputs(completion_batch(prompts[rows], completions[rows], *pad)))
        return window

    def _generate(self, source: Source, prompts: list[Tensor], config) -> list[Tensor]:
        wrapped = self.model_wrapped if source == "student" else self.teacher_model
        device = self.accelerator.device
        seed = completion_seed(self.args.seed, self.state.global_step, self.accelerator.process_index)
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            _trl.unwrap_model_for_generation(
                wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self.accelerator.autocast(),
        ):
            torch.manual_seed(seed)
            return generate_completions(_trl.causal_lm(model), prompts, config, self.args.generation_batch_size)

    def _sampling_config(self, source: Source):
        model = self.model if source == "student" else self.teacher_model
        base = _trl.causal_lm(self.accelerator.unwrap_model(model))
        return sampling_config(
            eos_token_ids=eos_token_ids(self._tokenizer, self._student_generation_config, base.generation_config),
            pad_token_id=self._tokenizer.pad_token_id,
            padded_ids=range(self.vocabulary, base.config.get_text_config().vocab_size),
            **{name: getattr(self.args, name) for name in SAMPLING_FIELDS},
        )

    # ---- The loss ----

    def training_step(self, *args, **kwargs):
        """SFTTrainer's step: the window has been written already. TAID's λ follows the window's loss."""
        loss = SFTTrainer.training_step(self, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self._run_objective.follow(self.state.global_step / self.state.max_steps)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Σ over trained tokens / the trained tokens of the window on all processes.

        Multiplied by the number of processes where the count is global, because their gradients are averaged.
        """
        student = self.accelerator.unwrap_model(model)
        teacher_states = self._teacher_states(inputs)
        total, row_sums, predictions = _trl.forward_redirection(
            model, student, self._loss, student, inputs, *teacher_states
        )
        if student.training:  # DeepSpeed's wrapper says so of itself even in evaluation
            self._record(self._train_means, row_sums)
            self._run_objective.add(*row_sums[:, -2:].sum(0))
        else:
            self._record(self._eval_means, self.accelerator.gather_for_metrics(row_sums))
        if num_items_in_batch is None:
            loss = total / row_sums[:, -1].sum().clamp(min=1).to(total)
        else:
            loss = total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
            if self.args.average_tokens_across_devices:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {"predictions": predictions}) if return_outputs else loss

    def _teacher_states(self, inputs: dict[str, Any]) -> tuple[Tensor, Head]:
        """The teacher's hidden states at trained positions, and its head."""
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        base = _trl.causal_lm(teacher)
        tokens = (inputs["input_ids"], inputs["attention_mask"])
        with torch.no_grad(), self.accelerator.autocast():
            hidden = _trl.forward_redirection(self.teacher_model, teacher, _trl.backbone_states, base, *tokens)
        trained = inputs["labels"][:, 1:] != -100
        return hidden[:, :-1][trained.to(hidden.device)], _trl.language_model_head(base)

    def _loss(
        self, student: nn.Module, inputs: dict[str, Any], teacher_hidden: Tensor, teacher_head: Head
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Σ loss; per row, sums of FIGURES[:-1] and the token count; the student's tokens (batch, tokens - 1)."""
        with self.accelerator.autocast():
            base = _trl.causal_lm(student)
            head = _trl.language_model_head(base)
            hidden = _trl.backbone_states(base, inputs["input_ids"], inputs["attention_mask"]).to(head.weight.device)
            targets = inputs["labels"][:, 1:].to(hidden.device)
            trained = targets != -100
            with _trl.gathered_head(teacher_head):
                total, figures = linear_token_loss(
                    hidden[:, :-1][trained],
                    head.cut(self.vocabulary),
                    teacher_hidden,
                    teacher_head.cut(self.vocabulary),
                    self._run_objective.token_loss(inputs.get("source")),
                    (targets[trained],),
                    self.args.logits_chunk_size,
                )
        predictions = torch.full_like(targets, -100).masked_scatter(trained, figures[:, -1].long())
        summands = torch.cat([figures[:, :-1], torch.ones_like(figures[:, :1])], dim=1)
        row_sums = summands.new_zeros(len(targets), summands.shape[1])
        return total, row_sums.index_add(0, trained.nonzero()[:, 0], summands), predictions

    # ---- Evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss and, where metrics want them, the student's most likely tokens: never logits."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs["predictions"], inputs["labels"][:, 1:].contiguous()

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super()._evaluate(*args, **kwargs)
        # `eval_on_start` repeats, in a resumed run, what the share has followed already or never will.
        if not self.state.global_step == self._initial_global_step > 0:
            self._sources.follow(metrics)
        return metrics

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """The loss and the figures of the evaluation set, every trained token with the same weight."""
        self._eval_means.pop()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._eval_means.pop()  # no reduction: rows were gathered when they were recorded
        means["loss"] = means.get("objective", 0.0) + self.args.sft_weight * means.get("nll", 0.0)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    # ---- Logs, checkpoints, cards ----

    def _record(self, means: Means, row_sums: Tensor) -> None:
        *sums, _, tokens = row_sums.sum(0)
        for name, total in zip(TOKEN_MEANS, sums, strict=True):
            means.add(name, total, tokens)

    def _record_completions(self, source: Source, prompts: list[Tensor], completions: list[Tensor], config) -> None:
        ends = set(config.eos_token_id or ())
        clipped = [len(ids) == 0 or int(ids[-1]) not in ends for ids in completions]
        self._train_means.add("completions/mean_length", sum(map(len, completions)), len(completions))
        self._train_means.add("completions/clipped_ratio", sum(clipped), len(completions))
        if self._completion_log is not None:
            self._completion_log.remember(source, prompts, completions)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log; print the table of completions if asked to."""
        if self.model.training:
            means = self._train_means.pop(partial(self.accelerator.reduce, reduction="sum"))
            if means:  # not in the summary at the end
                logs.update(means | self._sources.figures | self._run_objective.figures)
            if self._completion_log is not None and self.is_world_process_zero():
                self._completion_log.write(self.state.global_step)
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_state(output_dir, (self._sources, self._run_objective), self.accelerator)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(checkpoint, (self._sources, self._run_objective), self.accelerator)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's card, followed by the objective's settings."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            with open(Path(self.args.output_dir, "README.md"), "a", encoding="utf-8") as card:
                card.write(objective_card(self.args, self.objective))
