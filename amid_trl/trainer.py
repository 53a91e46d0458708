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
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, TrainOutput
from trl import SFTTrainer

from amid_trl import _trl
from amid_trl._trl import GKDTrainer
from amid_trl.answers import ANSWER_MEANS, Answers
from amid_trl.batch_loss import BatchLoss, batch_loss
from amid_trl.batches import DistillationCollator, deal_by_length
from amid_trl.card import PAPER, complete_card, objective_table
from amid_trl.checkpoint import Stateful, load_state, save_state
from amid_trl.config import AMiDConfig, data_settings, own_copy
from amid_trl.data import prepare_dataset
from amid_trl.engines import evaluation_alone, forget_evaluation
from amid_trl.evaluation import rouge_scorer
from amid_trl.fsdp import check_fsdp, fsdp_evaluation
from amid_trl.generation import eos_token_ids
from amid_trl.linear import States
from amid_trl.memory import MemoryReport
from amid_trl.metrics import Means
from amid_trl.nonfinite import NonfiniteLoss
from amid_trl.placement import place
from amid_trl.run_objective import RunObjective
from amid_trl.sampling import Source
from amid_trl.sources import Sources, open_plain_text
from amid_trl.sparse import SparseTeacher, SparseTokenLoss
from amid_trl.survival import StopOnSigterm, checkpoint_to_resume, whole_checkpoint
from amid_trl.teacher import (
    common_positions,
    common_vocabulary,
    disable_dropout,
    freeze,
    load_models,
    merge_adapter,
)
from amid_trl.teachers import open_teacher, student_alone
from amid_trl.token_loss import DistillationTokenLoss
from amid_trl.validation import check_evaluation
from amid_trl.windows import WINDOW_MEANS, Windows
from amid_trl.writers import ModelWriter, VLLMWriter, Writer, require_vllm, writer_config


logger = logging.getLogger(__name__)


class AMiDTrainer(GKDTrainer):
    """Distil a teacher into a student through an α-mixture assistant (AMiD, arXiv 2510.15982).

    Args:
        model (`str`, `~transformers.PreTrainedModel` or `~peft.PeftModel`):
            The student: a name, a path (of a model or of an adapter, which is trained further), or a model.
        teacher_model (`str`, `~transformers.PreTrainedModel` or `~peft.PeftModel`, *optional*):
            The teacher, likewise; an adapter is kept beside its base, not merged. By default
            `args.teacher_model_name_or_path`. Frozen in place. None beside `args.teacher_model_server_url` or
            `args.teacher_cache`.
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
        pretrain_dataset: Dataset | IterableDataset | None = None,
    ):
        args = own_copy(args, model)
        if preprocess_logits_for_metrics is not None:
            raise ValueError("preprocess_logits_for_metrics has nothing to process: logits are never held as a whole")
        if args.use_vllm:
            require_vllm()
        if args.eval_generate:
            rouge_scorer()  # an ImportError where there is none, before anything is loaded
        set_seed(args.seed)
        student, teacher, tokenizer = load_models(
            model, teacher_model, args, processing_class, quantization_config, adapter_follows=peft_config is not None
        )
        check_evaluation(args, eval_dataset, compute_metrics)
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
        check_fsdp(self.accelerator, self.model)
        self.teacher_model = None if teacher is None else place(freeze(teacher), args, self.accelerator)
        run = (lambda: self.model_wrapped, args, self.accelerator)
        known = (tokenizer, self.vocabulary, self._positions, self.train_dataset, self.eval_dataset)
        self._teacher = open_teacher(self.teacher_model, self.model, *run, *known)
        token_loss = SparseTokenLoss if args.teacher_is_sparse else DistillationTokenLoss
        self._plain_text = open_plain_text(pretrain_dataset, args, self.accelerator, tokenizer, self._positions)

        self.lmbda, self.beta, self.temperature, self.seq_kd = args.lmbda, args.beta, args.temperature, args.seq_kd
        self._writers = self._open_writers()
        self.generation_config = self._writers["student"].config
        self._sources = Sources(args, self.accelerator)
        self._run_objective = RunObjective(args, self.accelerator, token_loss)
        self.objective = self._run_objective.current
        # The last two figures are no means: TAID's loss and the student's token, a prediction.
        self._token_means = token_loss.figures[:-2]
        self._train_means = Means((*self._token_means, *WINDOW_MEANS), self.accelerator.device)
        self._eval_means = Means((*self._token_means, *ANSWER_MEANS), self.accelerator.device)
        self._stop_on_sigterm = StopOnSigterm(self.accelerator)
        self.add_callback(self._stop_on_sigterm)
        self._memory = MemoryReport(self.accelerator, self.teacher_model, self.vocabulary)
        self.add_callback(self._memory)
        self._windows = Windows(args, tokenizer, self._writers, self._sources, self._train_means)
        self._nonfinite = NonfiniteLoss(args, self.accelerator, self.model, tokenizer, self.train_dataset)

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

    def _open_writers(self) -> dict[Source, Writer]:
        def config(model: nn.Module, *, greedy: bool = False) -> GenerationConfig:
            base = _trl.causal_lm(self.accelerator.unwrap_model(model))
            known = (self.vocabulary, base, self._student_generation_config)
            return writer_config(self.args, self._tokenizer, *known, greedy=greedy)

        run = (self.args, self.accelerator)
        writers: dict[Source, Writer] = {}
        if self.args.use_vllm:
            writers["student"] = VLLMWriter(self.model, config(self.model), *run, self._tokenizer)
        else:
            writers["student"] = ModelWriter(lambda: self.model_wrapped, config(self.model), *run)
        if self.args.eval_generate:
            writer = ModelWriter(lambda: self.model_wrapped, config(self.model, greedy=True), *run)
            self._answers = Answers(writer, self._tokenizer)
        if self.args.seq_kd:
            writers["teacher"] = ModelWriter(lambda: self.teacher_model, config(self.teacher_model), *run)
        return writers

    @property
    def _stateful(self) -> tuple[Stateful, ...]:
        return tuple(part for part in (self._sources, self._run_objective, self._plain_text) if part is not None)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "prompt_ids"]

    # ---- A window: the micro-batches of one optimizer step ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch a window, let its source write the completions, then count the trained tokens of all processes."""
        step, steps = self.state.global_step, self.state.max_steps
        batches = list(islice(epoch_iterator, num_batches if step < steps else 0))  # resumed when it was over
        if self._sources.needs_evaluation:
            self._evaluate(None, None, skip_scheduler=True)
        self.objective = self._run_objective.advance(step / steps)
        source = self._sources.choose(step, steps)
        if source != "dataset" and batches:
            batches = [self._prepare_inputs(batch) for batch in self._windows.written_by(source, batches, step)]
        if isinstance(self.data_collator, DistillationCollator):
            batches = deal_by_length(batches, self._tokenizer.pad_token_id, self.args.pad_to_multiple_of)
        for batch in batches:
            batch["source"] = source
        if self._plain_text is not None:
            for batch, blocks in zip(batches, self._plain_text.next_window(len(batches)), strict=True):
                batch["plain_text"] = blocks.to(device)
                batch["plain_weight"] = self.args.pretrain_weight / len(batches)
        for name, share in self._sources.shares(source).items():
            self._train_means.add(name, share, 1)
        return batches, self._get_num_items_in_batch(batches, device)

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
        # Bound, not passed on: FSDP2 casts a forward's arguments to its own dtype.
        in_forward = partial(self._loss, inputs=inputs, teacher=self._teacher(inputs))
        total, row_sums, predictions, plain_nll = _trl.forward_redirection(model, student, in_forward, student)
        if num_items_in_batch is None:
            loss = total / row_sums[:, -1].sum().clamp(min=1).to(total)
        else:
            loss = total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
            if self.args.average_tokens_across_devices:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if plain_nll is not None:
            loss = loss + inputs["plain_weight"] * plain_nll
        if not student.training:  # DeepSpeed's wrapper says it trains even in evaluation
            self._record(self._eval_means, self.accelerator.gather_for_metrics(row_sums))
        elif self._nonfinite.found(loss):
            loss = self._nonfinite.handle(loss, row_sums, inputs, self.state.global_step)
        else:
            self._record(self._train_means, row_sums)
            self._run_objective.add(*row_sums[:, -2:].sum(0))
            if plain_nll is not None:
                self._train_means.add("pretrain_nll", plain_nll.detach(), 1)
        return (loss, {"predictions": predictions}) if return_outputs else loss

    def _loss(self, student: nn.Module, inputs: dict[str, Any], teacher: States | SparseTeacher) -> BatchLoss:
        token_loss = self._run_objective.token_loss(inputs.get("source"))
        with self.accelerator.autocast():
            return batch_loss(student, inputs, teacher, token_loss, self.vocabulary, self.args.logits_chunk_size)

    # ---- Evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss and, where metrics want them, the student's most likely tokens: never logits."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if self.args.eval_generate:
            figures = self.accelerator.gather_for_metrics(self._answers(inputs, self.state.global_step))
            counts = (~figures.isnan()).sum(0)
            for name, total, count in zip(ANSWER_MEANS, figures.nansum(0), counts, strict=True):
                self._eval_means.add(name, total, count)
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
        with evaluation_alone(self), fsdp_evaluation(self):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._eval_means.pop()  # no reduction: rows were gathered when they were recorded
        means["loss"] = means.get("objective", 0.0) + self.args.sft_weight * means.get("nll", 0.0)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    # ---- Checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """As in transformers, but True means the last whole checkpoint. After SIGTERM it ends the process."""
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir, self.accelerator)
        forget_evaluation(self)
        with self._stop_on_sigterm:
            return super().train(checkpoint, *args, **kwargs)

    def _save(self, *args, **kwargs) -> None:
        with student_alone(self.model):
            super()._save(*args, **kwargs)

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
        save_state(output_dir, self._stateful, self.accelerator)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(checkpoint, self._stateful, self.accelerator)

    # ---- Logs, cards ----

    def _record(self, means: Means, row_sums: Tensor) -> None:
        *sums, _, tokens = row_sums.sum(0)
        for name, total in zip(self._token_means, sums, strict=True):
            means.add(name, total, tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log; print the table of completions if asked to."""
        if self.model.training:
            means = self._train_means.pop(partial(self.accelerator.reduce, reduction="sum"))
            if means:  # not in the summary at the end
                logs.update(means)
                for part in (self._sources, self._run_objective, self._nonfinite, self._memory):
                    logs.update(part.figures)
            if self.is_world_process_zero():
                self._windows.write_table(self.state.global_step)
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's card with both models' names, followed by the objective's settings."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            teacher = None if self.teacher_model is None else self.accelerator.unwrap_model(self.teacher_model)
            settings = objective_table(self.args, self.objective)
            complete_card(Path(self.args.output_dir, "README.md"), self.model, teacher, settings)
