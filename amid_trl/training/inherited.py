"""What becomes here of every field of the configurations that AMiDConfig inherits, or that its users come from.

Tests compare these tables with the installed dataclasses, so that a field of a new release has to be classified before
it is accepted. docs/trainer.md shows them.
"""

from collections.abc import Mapping
from typing import Any


# Fields of SFTConfig and TrainingArguments: the values that are accepted, and why no other is.
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "eval_packing": ((None, False), "an evaluation's figures are of its rows, which are counted one by one"),
    "packing_strategy": (("bfd",), "a row is read whole, with what its prompt says"),
    "truncation_mode": (("keep_start",), "a completion loses its end and a prompt is never cut"),
    "loss_type": (("nll",), "the loss is set by `objective` and `sft_weight`"),
    "label_smoothing_factor": ((0.0,), "the loss is set by `objective` and `sft_weight`"),
    "torch_compile": ((False,), "the loss runs the model below its head, which a compiled forward would bypass"),
    "enable_jit_checkpoint": ((False,), "SIGTERM saves a checkpoint without it"),
    "label_names": ((None, ["labels"]), "what is trained is in the column labels"),
    "auto_find_batch_size": (
        (False,),
        "a run that starts again in the middle would keep what it has replayed and adapted; with half of "
        "per_device_train_batch_size and twice gradient_accumulation_steps the numbers are the same",
    ),
}

# Of SFTConfig's own fields those that are honoured, and how.
HONOURED = {
    "model_init_kwargs": "loads a student given by name",
    "trust_remote_code": "for student, teacher and tokenizers",
    "router_aux_loss_coef": "the load-balancing loss of a mixture-of-experts student, of all tokens of a window; with "
    "None or 0.0 it is not computed",
    "chat_template_path": "by SFTTrainer; a teacher without the tokens that it brings is refused",
    "dataset_text_field": "the column of plain text, of `pretrain_dataset` too",
    "dataset_kwargs": "`skip_prepare_dataset`, beside a collator of your own or for rows of `input_ids` and `labels`; "
    "any other key is refused",
    "dataset_num_proc": "processes that tokenise",
    "eos_token": "by SFTTrainer; beside it the EOS tokens of the generation config end a turn as well",
    "max_length": "bounds prompt and completion together, and so do both models' positions; one that leaves no room "
    "beside `max_new_tokens` bounds the dataset's rows and the prompts alone, as in GKD",
    "shuffle_dataset": "shuffles the rows once, by `seed`",
    "padding_free": "student and teacher read the rows of a micro-batch one behind the other, without padding; "
    "families that do not tell them apart by position ids are refused by name",
    "packing": "a row of a micro-batch is filled with several of the dataset's, up to `max_length` tokens, also after "
    "the student has written them anew; with `padding_free`, as in TRL. For training alone",
    "pad_to_multiple_of": "for rows of the dataset and for those that are written; refused beside `padding_free`",
    "completion_only_loss": "False trains the prompt of `prompt`/`completion` rows; True is refused on plain text",
    "assistant_only_loss": "is what is done anyway, with any chat template; True is refused on text",
    "activation_offloading": "by SFTTrainer, around each training step; needs an accelerator",
    "pad_token": "by SFTTrainer; a collator of your own pads by itself",
}

# Of GKDConfig's fields those that its help explains otherwise.
GKD_DIFFERS = {
    "teacher_model_name_or_path": "has to be given, as this or as the trainer's `teacher_model`, unless a server, a "
    "cache or an adapter of the student's base stands for it, or `teachers` names several",
}

# Fields that trl.DistillationConfig has and AMiDConfig has not.
NOT_OF_DISTILLATION = {
    "max_tool_calling_iterations": "no tools are called while the student writes; tool calls in the data are trained",
    "log_unique_prompts": "the table of log_completions has every prompt of the last window",
}

_BY_BYTES = "tokens are paired by their bytes, and split ones by the chain rule along the text"
_NOT_SORTED = "probabilities sorted by size are not compared, so there is no part of theirs to weigh"
_ONE_TEMPERATURE = "both models have the same one, `distill_temperature`"
_ENDS = "the end of an answer is trained like its other tokens"

# Fields that GOLDConfig has, and neither AMiDConfig nor DistillationConfig.
NOT_OF_GOLD = {
    "use_uld_loss": "a teacher with another tokenizer is known by its tokenizer; leave it out",
    "use_extended_uld": _BY_BYTES,
    "uld_token_merge_strategy": _BY_BYTES,
    "uld_use_hybrid_loss": _NOT_SORTED,
    "uld_hybrid_matched_weight": _NOT_SORTED,
    "uld_hybrid_unmatched_weight": _NOT_SORTED,
    "uld_crossentropy_weight": "`sft_weight` is the weight of the cross-entropy",
    "uld_distillation_weight": "the distillation has weight 1, and `sft_weight` is the cross-entropy's",
    "uld_student_temperature": _ONE_TEMPERATURE,
    "uld_teacher_temperature": _ONE_TEMPERATURE,
    "uld_skip_student_eos": _ENDS,
    "uld_skip_teacher_eos": _ENDS,
    "vllm_sync_frequency": "vLLM gets the weights anew for every window that it writes",
    "log_completions_steps": "log_completions writes its table with the figures, every `logging_steps`",
    "wandb_log_unique_prompts": NOT_OF_DISTILLATION["log_unique_prompts"],
    "callbacks": "callbacks are an argument of the trainer, as objects",
}

NOT_OURS = {**NOT_OF_DISTILLATION, **NOT_OF_GOLD}

# Those that mean something else here, or are another name's; the rest of its fields mean the same.
DISTILLATION_DIFFERS = {
    "max_completion_length": "sets `max_new_tokens`, whose default is 128",
    "temperature": "of the sampling alone; `distill_temperature` is the loss's",
    "beta": 'of `objective="gkd"` alone, where it means the same; any other objective warns that it is not read',
    "pad_to_multiple_of": "of the whole row, not of prompt and completion each",
    "ds3_gather_for_generation": "under FSDP2 too",
    "generation_kwargs": "with `use_vllm` of SamplingParams, else of GenerationConfig; what the trainer sets itself "
    "(length, end, number of completions) is refused",
    "shuffle_dataset": "shuffles the rows once; the order of each epoch is drawn either way",
    "log_completions": "printed, written to `output_dir/completions`, and sent to TensorBoard, wandb and trackio",
    "vllm_structured_outputs_regex": "refused without `use_vllm`, as all of vLLM's fields that are set are",
}

# The defaults there that change what is trained, and are others here. `temperature` is the loss's as well there, the
# length is called `max_completion_length`, and the student writes everything.
DISTILLATION_DEFAULTS = {
    "temperature": 1.0,
    "learning_rate": 1e-6,
    "disable_dropout": False,
    "shuffle_dataset": True,
    "max_new_tokens": 512,
    "lmbda": 1.0,
    "objective": "gkd",
    "beta": 1.0,
}
