"""AMiDTrainer: TRL's trainer around an Objective.

It is a GKDTrainer to every script that asks, but runs none of GKDTrainer's code (docs/trainer.md says why): PEFT,
saving and logging are SFTTrainer's, and what distillation adds lives in the modules that are wired together here.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from trl import SFTTrainer

from amid_trl._trl import GKDTrainer, forward_redirection, global_then_local_main_first, is_in_notebook
from amid_trl.data.batches import ROW_COLUMNS, TEACHER_COLUMNS, DistillationCollator, counted
from amid_trl.data.datasets import known_datasets, prepare_dataset
from amid_trl.data.packing import PACKED_ROWS, arranged_dataset
from amid_trl.data.row_teachers import SINGLE, TEACHER
from amid_trl.maths.figures import Figures
from amid_trl.models.fsdp import fsdp_evaluation
from amid_trl.models.generation import eos_token_ids
from amid_trl.run import Run
from amid_trl.sources.windows import Window
from amid_trl.teacher.adapter import student_alone
from amid_trl.training.answers import add_answers
from amid_trl.training.batch_loss import BatchLoss, batch_loss, row_names
from amid_trl.training.card import PAPER, card_folder, complete_card
from amid_trl.training.checkpoints import checkpoint_to_resume, load_state, save_state, whole_checkpoint
from amid_trl.training.config import AMiDConfig, data_settings, for_sft, own_arguments, own_collator
from amid_trl.training.ends import warn_of_endless
from amid_trl.training.engines import evaluation_alone, forget_evaluation
from amid_trl.training.kernels import compile_ahead
from amid_trl.training.pair import load_pair
from amid_trl.training.parts import open_parts
from amid_trl.training.student import complete_student, own_router_fields, padded_for_sft, prepare_student
from amid_trl.training.teacher_models import placed_teachers


class AMiDTrainer(GKDTrainer):
    """Distil a teacher into a student through an α-mixture assistant (AMiD, arXiv 2510.15982).

    Args:
        model (`str`, `~transformers.PreTrainedModel` or `~peft.PeftModel`):
            The student: a name, a path (of a model or of an adapter, which is trained further), or a model.
        teacher_model (`str`, `~transformers.PreTrainedModel` or `~peft.PeftModel`, *optional*):
            The teacher, likewise; an adapter is kept beside its base, not merged. By default
            `args.teacher_model_name_or_path`. Frozen in place. None beside `args.teacher_model_server_url` or
            `args.teacher_cache`. Several by name are a dict (docs/teacher.md).
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
        pretrain_dataset (`Dataset` or `IterableDataset`, *optional*):
            Plain text for the cross-entropy beside the distillation, by default `args.pretrain_dataset`.
        compute_metrics (`Callable`, *optional*):
            Gets the student's likeliest token ids as `predictions` (batch, tokens), -100 where untrained; no logits.
        callbacks, optimizers, peft_config, formatting_func, quantization_config:
            As in [`~trl.SFTTrainer`].
    """

    # More than SFTTrainer and transformers say of theirs.
    args: AMiDConfig
    model: nn.Module
    model_wrapped: nn.Module
    processing_class: PreTrainedTokenizerBase
    loss_is_scaled_for_ga = True
    _tag_names = ["trl", "amid"]
    _name = "AMiD"
    _paper = PAPER

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        teacher_model: PreTrainedModel | nn.Module | str | Mapping[str, Any] | None = None,
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
        pretrain_dataset: Dataset | IterableDataset | None = None,
    ):
        if preprocess_logits_for_metrics is not None:
            raise ValueError("preprocess_logits_for_metrics has nothing to process: logits are never held as a whole")
        functions = {"formatting_func": formatting_func, "compute_metrics": compute_metrics, "collator": data_collator}
        args = own_arguments(args, model, teacher_model, train_dataset, eval_dataset, **functions)
        pair = load_pair(model, teacher_model, args, processing_class, quantization_config, peft_config=peft_config)
        reads_plain_text = pretrain_dataset is not None or args.pretrain_dataset is not None
        compile_ahead(args, pair, evaluates=eval_dataset is not None, reads_plain_text=reads_plain_text)
        tokenizer, self._positions, self._teacher_tokenizer = pair.tokenizer, pair.positions, pair.teacher_tokenizer
        self._student_generation, self._known = pair.generation, cache(partial(pair.known, pair.student))
        with own_router_fields(pair.student), padded_for_sft(args):
            SFTTrainer.__init__(
                self,
                cast(Any, pair.student),
                args=for_sft(args, pair.student, has_collator=data_collator is not None),
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
        self.vocabulary = self._known().student.count
        self.data_collator = data_collator or own_collator(args, self._known())
        # The loss divides by the window's token count, whatever the model takes.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        prepare_student(self.model, args, self.accelerator, tokenizer, is_mixture=self.aux_loss_enabled)
        datasets = known_datasets(self.train_dataset, self.eval_dataset, self.data_collator)
        run = Run(args, self.accelerator, tokenizer, self.vocabulary, self._positions, pair.renamed)
        teachers, run = placed_teachers(pair.teachers, run, self.model, datasets)
        self._parts = open_parts(
            run,
            self.model,
            lambda: self.model_wrapped,
            self._student_generation,
            teachers,
            datasets,
            pretrain_dataset,
            deals=isinstance(self.data_collator, DistillationCollator),
        )
        self._show_parts()

    # ---- Before training ----

    def _send_telemetry(self) -> None:
        """TRL would report to the Hub that it is used; nothing is sent (SECURITY.md)."""

    def _show_parts(self) -> None:
        """What scripts for GKDTrainer look at, and the callbacks."""
        args, parts = self.args, self._parts
        self.lmbda, self.beta, self.temperature, self.seq_kd = args.lmbda, args.beta, args.temperature, args.seq_kd
        self.generation_config = parts.writers["student"].config
        self.teachers, self.teacher_models = parts.teachers.by_name, parts.teacher_models
        self.teacher, self.teacher_model = parts.teachers.single, parts.teacher_models.get(SINGLE)  # none with names
        self.objective, self._windows = parts.objectives.single, parts.windows
        self.row_recorder: Callable[[Figures], None] | None = None  # gets the figures of every row that is evaluated
        for callback in parts.callbacks:
            self.add_callback(callback)
        if is_in_notebook():
            import_module("amid_trl.training.notebook").show_in_notebook(self)

    def _prepare_dataset(self, dataset, processing_class: Any, args: Any, packing, formatting_func, dataset_name):
        settings = data_settings(
            args,
            positions=self._positions,
            evaluates=dataset_name != "train",
            eos_token_ids=eos_token_ids(processing_class, self._student_generation),
            formatting_func=formatting_func,
            teacher_tokenizer=self._teacher_tokenizer,
        )
        with global_then_local_main_first():
            made = prepare_dataset(dataset, processing_class, settings, name=dataset_name)
            rows = self._known().checked(made, dataset_name)
            warn_of_endless(rows, processing_class, settings, name=dataset_name)
            return arranged_dataset(rows, settings, seed=args.seed if args.shuffle_dataset else None, packs=packing)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*ROW_COLUMNS, *TEACHER_COLUMNS, TEACHER, "attention_mask", PACKED_ROWS]

    # ---- A window: the micro-batches of one optimizer step ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch a window, let its source write the completions, then count the trained tokens of all processes."""
        step, steps = self.state.global_step, self.state.max_steps
        batches = self._parts.lookahead.take(epoch_iterator, num_batches if step < steps else 0)
        if self._parts.sources.needs_evaluation:
            self._evaluate(None, None, skip_scheduler=True)
        self.objective = self._parts.objectives.advance(step / steps)
        window = self._windows.window(batches, step, steps, self._prepare_inputs)
        self._parts.window = window = self._parts.balancing(window)
        self._parts.ask_ahead(epoch_iterator, num_batches, step + 1, steps)
        return window.batches, self._get_num_items_in_batch([*map(counted, window.batches)], device)

    # ---- The loss ----

    def training_step(self, *args, **kwargs):
        """SFTTrainer's step: the window has been written already. TAID's λ follows the window's loss."""
        loss = SFTTrainer.training_step(self, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self._parts.objectives.follow(self.state.global_step / self.state.max_steps)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Σ over trained tokens / the trained tokens of the window on all processes.

        Multiplied by the number of processes where the count is global, because their gradients are averaged.
        """
        student: Any = self.accelerator.unwrap_model(model)
        # DeepSpeed's wrapper says it trains even in evaluation.
        window = self._parts.window if student.training else Window()
        token_losses = self._parts.objectives.token_losses(window.source)
        answers = self._parts.ask_teachers(inputs)
        # Bound, not passed on: FSDP2 casts a forward's arguments to its own dtype.
        in_forward = partial(self._loss, inputs=inputs, answers=answers, token_losses=token_losses, window=window)
        total, row_sums, predictions, plain_nll, aux_loss = forward_redirection(model, student, in_forward, student)
        rows = Figures(row_names(token_losses), row_sums)
        if num_items_in_batch is None:
            loss = total / rows["tokens"].sum().clamp(min=1).to(total)
        else:
            loss = total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
            if self.args.average_tokens_across_devices:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if plain_nll is not None:
            loss = loss + window.plain_weight * plain_nll
        if window.balance is not None:
            loss = loss + window.balance.weight * self.accelerator.num_processes * aux_loss
            self._parts.train_means.add("aux_loss", aux_loss.detach(), window.balance.share)
        if not student.training:
            self._record_evaluation(rows)
        elif self._parts.nonfinite.found(loss):
            loss = self._parts.nonfinite.handle(loss, rows, inputs, window.source, self.state.global_step)
        else:
            self._parts.record(self._parts.train_means, rows)
            self._parts.objectives.add(rows)
            if plain_nll is not None:
                self._parts.train_means.add("pretrain_nll", plain_nll.detach(), 1)
        return (loss, {"predictions": predictions}) if return_outputs else loss

    def _loss(self, student, inputs, answers, token_losses, window) -> BatchLoss:
        with self.accelerator.autocast():
            settings = (self.vocabulary, self.args.logits_chunk_size, window.balance, self.args.padding_free)
            return batch_loss(student, inputs, answers, token_losses, *settings)

    def _record_evaluation(self, rows: Figures) -> None:
        self._parts.record(self._parts.eval_means, rows := self._gathered(rows))
        if self.row_recorder is not None:
            self.row_recorder(rows)

    def _gathered(self, rows: Figures) -> Figures:
        """The rows of all processes, each once."""
        return Figures(rows.names, cast(Tensor, self.accelerator.gather_for_metrics(rows.columns)))

    # ---- Evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss and, where metrics want them, the student's most likely tokens: never logits."""
        inputs = self._parts.evaluated_text(asked := cast(Any, self._prepare_inputs(inputs)))
        with torch.no_grad():
            loss, outputs = cast(Any, self.compute_loss(model, inputs, return_outputs=True))
        if self._parts.answers is not None:
            add_answers(self._parts.eval_means, self._gathered(self._parts.answers(asked, self.state.global_step)))
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs["predictions"], inputs["labels"][:, 1:].contiguous()

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super()._evaluate(*args, **kwargs)
        # `eval_on_start` repeats, in a resumed run, what the share has followed already or never will.
        if not self.state.global_step == self._initial_global_step > 0:
            self._parts.sources.follow(metrics)
        return metrics

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """The loss and the figures of the evaluation set, every trained token with the same weight."""
        self._parts.check_evaluated(known_datasets(None, dataloader.dataset, self.data_collator))
        self._parts.eval_means.pop()
        with evaluation_alone(self), fsdp_evaluation(self):
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        figures = self._parts.evaluated(self.args.sft_weight)
        cast(Any, output.metrics).update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    # ---- Checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """As in transformers, but True is the last whole checkpoint, "auto" that or none. SIGTERM ends the process."""
        self.args.check_steps()
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir), self.accelerator)
        forget_evaluation(self)
        try:
            with self._parts.stop_on_sigterm, self._parts.seconds:
                return super().train(checkpoint, *args, **kwargs)
        finally:
            self._parts.window = Window()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, and with the card beside it."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            with card_folder(self.args, output_dir):
                self.create_model_card()

    def _save(self, output_dir: str | None = None, *args, **kwargs) -> None:
        with student_alone(self.model):
            super()._save(output_dir, *args, **kwargs)
        complete_student(self.model, output_dir or str(self.args.output_dir))

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = self._get_output_dir(trial=trial)
        with whole_checkpoint(run_dir, self.args, self.state, self.accelerator) as checkpoint:
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not while it is written, marked as unfinished: `_save_checkpoint` pushes it."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_state(output_dir, self._parts.stateful, self.accelerator)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(checkpoint, self._parts.stateful, self.accelerator)

    # ---- Logs, cards ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log; print the table of completions if asked to."""
        if self.model.training:
            if means := self._parts.train_means.pop(cast(Any, partial(self.accelerator.reduce, reduction="sum"))):
                logs.update(means | self._parts.figures)  # not in the summary at the end
            if self.is_world_process_zero():
                self._parts.write_table(self.state.global_step, self.callback_handler.callbacks)
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's card with both models' names, followed by the objective's settings."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            complete_card(self)
