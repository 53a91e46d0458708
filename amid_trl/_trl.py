"""The names that we need of trl, transformers, accelerate and peft beyond what they promise, and nothing of ours.

`HOOKS` says which they are, which parameters of them we rely on, and what for. A test compares it with the installed
versions and with our own code, so that a new release fails there, first and by name. DeepSpeed's are in it too, and
are imported by models/deepspeed.py.
"""

from importlib import import_module
from typing import Any, Literal, NamedTuple

from accelerate.commands.config import load_config_from_file
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import fsdp2_prepare_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMode
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import is_in_notebook
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import has_generation_markers
from trl.data_utils import common_prefix_length
from trl.import_utils import is_vllm_available, suppress_experimental_warning
from trl.models.utils import (
    _ForwardRedirection,
    prepare_deepspeed,
    unwrap_model_for_generation,
)
from trl.trainer.utils import (
    create_model_from_path,
    global_then_local_main_first,
    print_prompt_completions_sample,
    use_adapter,
)


try:
    with suppress_experimental_warning():  # a notice for those who import it; setup.py pins TRL because of it
        from trl.experimental.gkd import GKDConfig, GKDTrainer
except ImportError:  # TRL has removed experimental trainers before
    from trl import SFTTrainer as GKDTrainer

    from amid_trl._gkd import GKDConfig

if is_in_notebook():  # only there is IPython sure to be
    from transformers.utils.notebook import NotebookProgressBar, NotebookProgressCallback, NotebookTrainingTracker

__all__ = [
    "HOOKS",
    "PREFIX_CHECKPOINT_DIR",
    "AcceleratorConfig",
    "BaseTunerLayer",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GKDConfig",
    "GKDTrainer",
    "GenerationMode",
    "Hook",
    "NotebookProgressBar",
    "NotebookProgressCallback",
    "NotebookTrainingTracker",
    "TensorBoardCallback",
    "TrackioCallback",
    "WandbCallback",
    "common_prefix_length",
    "create_model_from_path",
    "default_config_file",
    "forward_redirection",
    "fsdp2_prepare_model",
    "global_then_local_main_first",
    "has_generation_markers",
    "hf_deepspeed",
    "is_in_notebook",
    "is_vllm_available",
    "launch_command",
    "launch_command_parser",
    "load_config_from_file",
    "prepare_deepspeed",
    "print_prompt_completions_sample",
    "render_jinja_template",
    "rotate_checkpoints",
    "unwrap_model_for_generation",
    "use_adapter",
    "vllm_engine",
]

forward_redirection = _ForwardRedirection()


def vllm_engine(**settings: Any) -> Any:
    """TRL's VLLMGeneration: the engine, its weights and its requests. Imported here, because it imports vLLM."""
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration(**settings)


class Hook(NamedTuple):
    """A name of another package that we override, call, read or set."""

    name: str  # module, and the names in it; an attribute of an object stands under the class that sets it
    how: Literal["overridden", "called", "read", "set"]
    why: str
    parameters: tuple[str, ...] = ()  # those that we pass or take
    optional: bool = False  # we do without it where it is gone

    def resolve(self) -> Any:
        """What is installed under this name; AttributeError or ImportError where there is nothing."""
        parts = self.name.split(".")
        for count in range(len(parts), 0, -1):
            try:
                found: Any = import_module(".".join(parts[:count]))
            except ModuleNotFoundError:
                continue
            for part in parts[count:]:
                found = getattr(found, part)
            return found
        raise ImportError(f"no package of {self.name} is installed")


_TRAINER = "transformers.Trainer"
_SFT = "trl.SFTTrainer"
_ZERO = "deepspeed.runtime.zero"

HOOKS = (
    # ---- overridden by AMiDTrainer or ComparedTrainer ----
    Hook(
        f"{_SFT}._prepare_dataset",
        "overridden",
        "rows are made by amid_trl.data",
        ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"),
    ),
    Hook(f"{_SFT}._send_telemetry", "overridden", "no report of usage", optional=True),
    Hook(f"{_SFT}._set_signature_columns_if_needed", "overridden", "columns of our rows are kept"),
    Hook(
        f"{_TRAINER}.get_batch_samples",
        "overridden",
        "a window is written and counted before it is trained",
        ("epoch_iterator", "num_batches", "device"),
    ),
    Hook(f"{_SFT}.training_step", "overridden", "TAID's share follows the window's loss"),
    Hook(
        f"{_SFT}.compute_loss", "overridden", "the loss", ("model", "inputs", "return_outputs", "num_items_in_batch")
    ),
    Hook(
        f"{_SFT}.prediction_step",
        "overridden",
        "token ids in place of logits",
        ("model", "inputs", "prediction_loss_only", "ignore_keys"),
    ),
    Hook(
        f"{_TRAINER}._evaluate",
        "overridden",
        "an adaptive share follows the evaluations of training",
        ("trial", "ignore_keys_for_eval", "skip_scheduler"),
    ),
    Hook(
        f"{_TRAINER}.evaluation_loop",
        "overridden",
        "figures of the evaluation set",
        ("dataloader", "metric_key_prefix"),
    ),
    Hook(f"{_TRAINER}.train", "overridden", "resuming from whole checkpoints, SIGTERM", ("resume_from_checkpoint",)),
    Hook(f"{_TRAINER}.save_model", "overridden", "the card beside the model", ("output_dir", "_internal_call")),
    Hook(
        f"{_TRAINER}._save", "overridden", "the teacher's adapter is not saved, the base's record is", ("output_dir",)
    ),
    Hook(f"{_SFT}._save_checkpoint", "overridden", "a checkpoint is whole, or known not to be", ("model", "trial")),
    Hook(
        f"{_TRAINER}._push_from_checkpoint", "overridden", "only whole checkpoints are pushed", ("checkpoint_folder",)
    ),
    Hook(f"{_TRAINER}._save_optimizer_and_scheduler", "overridden", "our state beside theirs", ("output_dir",)),
    Hook(f"{_TRAINER}._load_optimizer_and_scheduler", "overridden", "our state beside theirs", ("checkpoint",)),
    Hook(f"{_SFT}.log", "overridden", "our means in the logs", ("logs", "start_time")),
    Hook(f"{_SFT}.create_model_card", "overridden", "the card names the objective"),
    Hook(f"{_TRAINER}._get_eval_sampler", "overridden", "compared rows come in their order", ("eval_dataset",)),
    # ---- called, read or set on a trainer ----
    Hook(
        f"{_SFT}.__init__",
        "called",
        "past GKDTrainer's, which would load the teacher",
        (
            *("model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"),
            *("compute_metrics", "callbacks", "optimizers", "peft_config", "formatting_func"),
        ),
    ),
    Hook(f"{_TRAINER}._prepare_inputs", "called", "written text goes to the device", ("inputs",)),
    Hook(f"{_TRAINER}._get_num_items_in_batch", "called", "trained tokens of a window", ("batch_samples", "device")),
    Hook(f"{_TRAINER}._get_output_dir", "called", "where checkpoints lie", ("trial",)),
    Hook(f"{_TRAINER}.get_train_dataloader", "called", "a landscape is of the rows that training gets"),
    Hook(f"{_TRAINER}.get_tp_size", "called", "processes that share a batch"),
    Hook(f"{_TRAINER}.hub_model_id", "read", "where the model was pushed to"),
    Hook(f"{_TRAINER}.deepspeed", "read", "whether the student has an engine already"),
    Hook(f"{_TRAINER}.is_deepspeed_enabled", "set", "ZeRO-1 and 2 evaluate before training without an engine"),
    Hook(f"{_TRAINER}.model_accepts_loss_kwargs", "set", "the window's token count comes to the loss"),
    Hook(f"{_TRAINER}._loss_shifts_labels", "set", "a row's first label does not count: nothing predicts it"),
    Hook(f"{_TRAINER}.callback_handler", "read", "which trackers get the table of completions"),
    Hook(f"{_TRAINER}._initial_global_step", "read", "which evaluation a resumed run repeats"),
    Hook(f"{_TRAINER}._signature_columns", "set", "columns of our rows are kept"),
    Hook(
        f"{_TRAINER}.loss_is_scaled_for_ga",
        "set",
        "the loss is divided by the window's tokens, not again by its batches",
    ),
    Hook(f"{_SFT}.aux_loss_enabled", "read", "a loss of mixtures of experts that is not ours"),
    Hook(f"{_SFT}._tag_names", "set", "the card's tags"),
    Hook(f"{_SFT}._name", "set", "the card names the method"),
    Hook(f"{_SFT}._paper", "set", "the card cites the paper"),
    Hook(f"{_TRAINER}.create_optimizer", "called", "accelerate wraps an FSDP2 model with its optimizer alone"),
    # ---- functions and classes ----
    Hook(
        "trl.experimental.gkd.GKDTrainer",
        "read",
        "AMiDTrainer is one to scripts that ask; gone, SFTTrainer is its base",
        optional=True,
    ),
    Hook("trl.experimental.gkd.GKDConfig", "read", "GKD's fields; gone, ours are the same", optional=True),
    Hook("trl.experimental.gkd.gkd_config.GKDConfig", "read", "the same, read from its file", optional=True),
    Hook("trl.SFTConfig._VALID_DICT_FIELDS", "read", "fields that are JSON on the command line"),
    Hook("trl.models.utils._ForwardRedirection", "called", "the object that the next one is called on"),
    Hook(
        "trl.models.utils._ForwardRedirection.__call__",
        "called",
        "runs our loss inside the wrapper's forward, or DDP and ZeRO never see the parameters",
        ("wrapper_module", "original_module", "method", "args"),
    ),
    Hook(
        "trl.generation.vllm_generation.VLLMGeneration",
        "called",
        "the student's engine, its weights and its requests",
        (
            *("model", "accelerator", "processing_class", "mode", "structured_outputs_regex", "server_base_url"),
            *("server_host", "server_port", "server_timeout", "group_port", "tensor_parallel_size"),
            *("gpu_memory_utilization", "max_model_length", "max_num_seqs", "enable_sleep_mode", "model_impl"),
            *("trust_remote_code", "repetition_penalty", "temperature", "top_p", "top_k", "min_p"),
            *("max_completion_length", "logprobs", "generation_kwargs"),
        ),
    ),
    Hook("trl.generation.vllm_generation.VLLMGeneration.sync_weights", "called", "the engine writes with new weights"),
    Hook(
        "trl.generation.vllm_generation.VLLMGeneration.generate",
        "called",
        "one request for a window",
        ("prompts", "images", "num_generations"),
    ),
    Hook(
        "trl.models.utils.prepare_deepspeed",
        "called",
        "shards the teacher like the student under ZeRO-3",
        ("model", "accelerator"),
    ),
    Hook(
        "trl.models.utils.unwrap_model_for_generation",
        "called",
        "gathers weights, suspends checkpointing",
        ("model", "accelerator", "gather_deepspeed3_params", "gradient_checkpointing_kwargs"),
    ),
    Hook(
        "trl.trainer.utils.create_model_from_path",
        "called",
        "picks architecture and dtype as TRL does",
        ("model_id", "architecture"),
    ),
    Hook("trl.trainer.utils.global_then_local_main_first", "called", "one process tokenises, the others read it"),
    Hook(
        "trl.trainer.utils.print_prompt_completions_sample",
        "called",
        "the table of completions",
        ("prompts", "completions", "rewards", "advantages", "step", "num_samples"),
    ),
    Hook("trl.trainer.utils.use_adapter", "called", "the teacher's adapter for one pass", ("model", "adapter_name")),
    Hook("trl.import_utils.is_vllm_available", "called", "refuse early"),
    Hook("trl.import_utils.suppress_experimental_warning", "called", "a notice that our users cannot act on"),
    Hook(
        "trl.chat_template_utils.has_generation_markers",
        "called",
        "whether a template has generation marks",
        ("chat_template",),
    ),
    Hook("trl.data_utils.common_prefix_length", "called", "where the answer begins", ("ids", "other_ids")),
    Hook(
        "transformers.utils.chat_template_utils.render_jinja_template",
        "called",
        "text with generation marks",
        ("conversations", "chat_template", "return_assistant_tokens_mask", "add_generation_prompt"),
    ),
    Hook(
        "transformers.trainer_utils.rotate_checkpoints",
        "called",
        "old checkpoints go when the new one is whole",
        ("output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime"),
    ),
    Hook(f"{_TRAINER}.save_state", "called", "the logs of a run beside its student"),
    Hook("optuna.trial.FrozenTrial._trial_id", "read", "a trial that a killed sweep goes on with"),
    Hook("transformers.PreTrainedModel._is_stateful", "read", "whether a prompt is read once for its completions"),
    Hook("transformers.cache_utils.DynamicLayer", "read", "the same: what a cache of every token consists of"),
    Hook("transformers.cache_utils.DynamicSlidingWindowLayer", "read", "the same"),
    Hook("transformers.generation.GenerationMode", "read", "the same: a search that goes on from a cache"),
    Hook("transformers.trainer_pt_utils.AcceleratorConfig", "read", "a field of the arguments that a run copies"),
    Hook("transformers.PreTrainedConfig._name_or_path", "set", "where a model came from"),
    Hook("transformers.trainer_utils.PREFIX_CHECKPOINT_DIR", "read", "how checkpoints are called"),
    Hook("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", "called", "whether loading shards"),
    Hook("transformers.integrations.deepspeed.unset_hf_deepspeed_config", "called", "load a teacher whole"),
    Hook("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", "set", "load a teacher whole"),
    Hook("transformers.PreTrainedModel.disable_input_require_grads", "called", "a hook that checkpointing leaves"),
    Hook("transformers.PreTrainedConfig._attn_implementation", "read", "flash attention tells rows apart only in one"),
    Hook("transformers.PreTrainedModel._no_split_modules", "set", "which layers engines and device_map keep whole"),
    Hook(
        "accelerate.Accelerator._is_accelerate_prepared", "set", "a student that was evaluated is wrapped for training"
    ),
    Hook(
        "accelerate.utils.fsdp2_prepare_model", "called", "shards the teacher layer by layer", ("accelerator", "model")
    ),
    Hook("accelerate.commands.launch.launch_command", "called", "amid-trl train starts its processes", ("args",)),
    Hook(
        "accelerate.commands.launch.launch_command_parser", "called", "flags of the launcher; also read from its file"
    ),
    Hook(
        "accelerate.commands.config.load_config_from_file",
        "called",
        "how many processes a file asks for",
        ("config_file",),
    ),
    *(
        Hook(f"transformers.integrations.{name}", "read", "whether a tracker gets the table of completions")
        for name in ("TensorBoardCallback", "TrackioCallback", "WandbCallback")
    ),
    Hook("transformers.utils.is_in_notebook", "called", "whether there is a table to fill"),
    Hook(
        "transformers.utils.notebook.NotebookProgressCallback",
        "set",
        "training_tracker, prediction_bar and _force_next_update, beside a table of our own",
    ),
    Hook(
        "transformers.utils.notebook.NotebookTrainingTracker",
        "set",
        "its inner_table: head and lines",
        ("num_steps", "column_names"),
    ),
    Hook("transformers.utils.notebook.NotebookTrainingTracker.remove_child", "called", "the bar of an evaluation"),
    Hook(
        "transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK",
        "read",
        "what report_to may name; read from its file",
    ),
    Hook("transformers.utils.notebook.NotebookProgressBar", "read", "the bar of an evaluation"),
    Hook("accelerate.commands.config.config_args.default_config_file", "read", "whether accelerate has defaults"),
    Hook("peft.tuners.tuners_utils.BaseTunerLayer", "read", "which modules an adapter is on"),
    # ---- DeepSpeed's, in models/deepspeed.py ----
    Hook(f"{_ZERO}.partition_parameters.Init.ds_tensor", "read", "this process's part of a sharded weight"),
    Hook(f"{_ZERO}.partition_parameters.Init.ds_status", "read", "whether a weight is sharded, and whole just now"),
    Hook(f"{_ZERO}.partition_parameters.Init.ds_numel", "read", "elements of the whole weight"),
    Hook(f"{_ZERO}.partition_parameters.ZeroParamStatus", "read", "whether a weight is whole just now"),
    Hook(f"{_ZERO}.config.ZeroStageEnum", "read", "in an engine's files"),
    Hook("deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler", "read", "in an engine's files"),
    Hook("deepspeed.runtime.fp16.loss_scaler.LossScaler", "read", "in an engine's files"),
    Hook("deepspeed.utils.tensor_fragment.fragment_address", "read", "in an engine's files"),
    Hook("deepspeed.ops.op_builder.all_ops.ALL_OPS", "read", "whose compilations may have left a lock"),
)
