"""What AMiDTrainer does not honour of the configurations that it inherits or that its users come from."""

# Fields of SFTConfig and TrainingArguments: the one value that is accepted, and why no other is.
REFUSED = {
    "packing": (False, "rows are padded; packing would need document masks in both models"),
    "eval_packing": (None, "rows are padded; packing would need document masks in both models"),
    "padding_free": (False, "rows are padded"),
    "truncation_mode": ("keep_start", "a completion loses its end and a prompt is never cut"),
    "loss_type": ("nll", "the loss is set by `objective` and `sft_weight`"),
    "label_smoothing_factor": (0.0, "the loss is set by `objective` and `sft_weight`"),
    "torch_compile": (False, "the loss runs the model below its head, which a compiled forward would bypass"),
    "enable_jit_checkpoint": (False, "SIGTERM saves a checkpoint without it"),
    "router_aux_loss_coef": (None, "the load-balancing loss of mixture-of-experts models is not computed"),
}

# Fields that trl.DistillationConfig has and AMiDConfig has not.
NOT_OURS = {
    "max_tool_calling_iterations": "no tools are called while the student writes; tool calls in the data are trained",
    "log_unique_prompts": "the table of log_completions has every prompt of the last window",
}
