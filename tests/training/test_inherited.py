"""What becomes of the fields that AMiDConfig inherits, and of those that scripts for DistillationTrainer set."""

import re

import pytest
import torch
from observe import field_names, unclassified
from tiny import (
    messages_dataset,
    prompt_completion_dataset,
    text_dataset,
)
from transformers import TrainingArguments
from trl import SFTConfig

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.training.inherited import HONOURED, REFUSED


# Fields of TrainingArguments that transformers' own code reads, which we call or leave alone. The tests below cover
# those that our overrides could have bypassed.
OF_TRANSFORMERS = """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
    average_tokens_across_devices batch_eval_metrics bf16 bf16_full_eval data_seed dataloader_drop_last
    dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
    dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval do_predict do_train
    eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy
    eval_use_gather_object fp16 fp16_full_eval fsdp fsdp_config full_determinism gradient_accumulation_steps
    gradient_checkpointing gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id
    hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip include_for_metrics
    include_num_input_tokens_seen learning_rate length_column_name liger_kernel_config load_best_model_at_end
    local_rank log_level log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter logging_steps
    logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps metric_for_best_model
    neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules output_dir parallelism_config
    per_device_eval_batch_size per_device_train_batch_size prediction_loss_only project push_to_hub
    remove_unused_columns report_to restore_callback_states_from_checkpoint resume_from_checkpoint run_name
    save_on_each_node save_only_model save_steps save_strategy save_total_limit seed skip_memory_metrics tf32
    torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id
    trackio_static_space_id train_sampling_strategy use_cache use_cpu use_liger_kernel warmup_steps weight_decay
"""


OWN = field_names(SFTConfig) - field_names(TrainingArguments)


def test_every_field_of_sft_config_is_honoured_or_refused():
    for name in unclassified(OWN, HONOURED, REFUSED):
        pytest.fail(f"SFTConfig has a field {name} that nobody has classified (amid_trl/training/inherited.py)")
    assert set(HONOURED) <= OWN


def test_every_field_of_training_arguments_is_left_to_transformers_or_refused():
    for name in unclassified(field_names(TrainingArguments), OF_TRANSFORMERS.split(), REFUSED):
        pytest.fail(f"TrainingArguments has a field {name} that nobody has classified (here, or in inherited.py)")
    # Older releases that setup.py admits have not all of the others, but what the config reads must be there.
    assert set(REFUSED) <= field_names(TrainingArguments) | OWN


def test_a_field_that_nobody_knows_is_found():
    assert unclassified({"eval_packing", "new"}, HONOURED, REFUSED) == ["new"]
    assert unclassified({"eval_packing"}, {"eval_packing"}, REFUSED) == ["eval_packing"]


# A value of each field that is not accepted.
REFUSED_VALUES = {
    "eval_packing": True,
    "packing_strategy": "wrapped",
    "truncation_mode": "keep_end",
    "loss_type": "dft",
    "label_smoothing_factor": 0.1,
    "torch_compile": True,
    "enable_jit_checkpoint": True,
    "label_names": ["answers"],
    "auto_find_batch_size": True,
}


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_name_and_what_is_accepted_is_accepted(name):
    accepted, why = REFUSED[name]
    for value in accepted:
        AMiDConfig("unused", use_cpu=True, **{name: value})
    other = REFUSED_VALUES[name]
    with pytest.raises(ValueError, match=re.escape(f"does not support {name}={other!r}: {why}; leave it at")):
        AMiDConfig("unused", use_cpu=True, **{name: other})


def test_a_compilation_asked_for_by_its_mode_is_refused():
    with pytest.raises(ValueError, match="does not support torch_compile=True"):
        AMiDConfig("unused", use_cpu=True, torch_compile_mode="default")


# ---- SFTConfig's own ----


def test_an_unknown_key_of_dataset_kwargs_is_refused():
    with pytest.raises(ValueError, match="dataset_kwargs may have skip_prepare_dataset alone; got add_special_tokens"):
        AMiDConfig("unused", use_cpu=True, dataset_kwargs={"add_special_tokens": False})


def test_completions_alone_cannot_be_trained_where_there_are_none(train):
    with pytest.raises(ValueError, match="completion_only_loss=True, but the train dataset has no completions"):
        train(train_dataset=text_dataset(4), completion_only_loss=True)
    assert train(train_dataset=prompt_completion_dataset(4), completion_only_loss=True).train_dataset


def test_the_assistants_turns_alone_need_no_template_that_trl_knows(train, tokenizer):
    assert "generation %}" not in tokenizer.chat_template  # TRL can neither read nor mark it
    asked, plain = train(assistant_only_loss=True).train_dataset, train().train_dataset
    assert asked["labels"] == plain["labels"]
    answers = [label for label in asked["labels"][0] if label != -100]
    assert tokenizer.decode(answers) == "The capital of France is Paris.<|im_end|>"


def test_the_assistants_turns_alone_are_asked_for_where_there_are_some(train, tokenizer):
    with pytest.raises(ValueError, match="the dataset is not conversational"):
        train(train_dataset=text_dataset(4), assistant_only_loss=True)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
        "{{- '<|im_start|>' + message['role'] + '\n' }}{%- if message['role'] == 'assistant' %}{%- generation %}"
        "{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}{%- else %}"
        "{{- message['content'] + '<|im_end|>' }}{%- endif %}{{- '\n' }}",
    )
    asked, plain = train(assistant_only_loss=True).train_dataset, train().train_dataset
    assert asked["labels"] == plain["labels"]


def test_tokens_for_end_and_padding_reach_the_rows(train, student):
    trainer = train(eos_token="<|im_start|>", train_dataset=text_dataset(2))
    start = trainer.processing_class.convert_tokens_to_ids("<|im_start|>")
    assert all(row[-1] == start for row in trainer.train_dataset["input_ids"])


@pytest.mark.filterwarnings("ignore:.*pad_token.*:FutureWarning")
def test_the_padding_token_pads(train):
    trainer = train(pad_token="<|im_start|>")
    assert trainer.data_collator.pad_token_id == trainer.processing_class.convert_tokens_to_ids("<|im_start|>")


def test_a_training_step_is_within_the_offloading_of_activations(train, monkeypatch):
    # TRL's own needs an accelerator.
    entered = []

    class Offloading:
        def __enter__(self):
            entered.append("step")

        def __exit__(self, *_):
            entered.append("over")

    monkeypatch.setattr("trl.trainer.sft_trainer.get_act_offloading_ctx_manager", lambda model: Offloading())
    trainer = train(activation_offloading=True, max_steps=1)
    loss = AMiDTrainer.compute_loss
    monkeypatch.setattr(
        AMiDTrainer, "compute_loss", lambda *args, **kwargs: entered.append("loss") or loss(*args, **kwargs)
    )
    trainer.train()
    assert entered == ["step", "loss", "over"]


# ---- Fields of TrainingArguments that our overrides could bypass ----


def evaluated(train, **settings):
    """What compute_metrics was given at each call, and what was measured."""
    calls = []

    def metrics(prediction, compute_result=None):
        calls.append((prediction, compute_result))
        return {"calls": float(len(calls))}

    trainer = train(
        eval_dataset=messages_dataset(5), compute_metrics=metrics, per_device_eval_batch_size=2, **settings
    )
    return calls, trainer.evaluate()


def test_metrics_get_inputs_and_losses_if_asked_for(train):
    [(prediction, _)], _ = evaluated(train, include_for_metrics=["inputs", "loss"])
    assert prediction.inputs.shape[0] == prediction.losses.shape[0] == 5
    [(prediction, _)], _ = evaluated(train)
    assert prediction.inputs is None and prediction.losses is None


def test_metrics_by_batch_are_asked_for_after_every_batch(train):
    calls, measured = evaluated(train, batch_eval_metrics=True)
    assert [last for _, last in calls] == [False, False, True]
    assert measured["eval_calls"] == 3


def test_predictions_stay_apart_or_wait_on_the_host_without_another_figure(train):
    [(plain, _)], measured = evaluated(train)
    [(apart, _)], again = evaluated(train, eval_do_concat_batches=False, eval_accumulation_steps=1)
    assert [len(batch) for batch in apart.predictions] == [2, 2, 1]
    assert len(plain.predictions) == 5
    assert measured["eval_kl"] == again["eval_kl"]


def test_nothing_is_predicted_if_only_the_loss_is_wanted(train):
    calls, measured = evaluated(train, prediction_loss_only=True)
    assert not calls and measured["eval_loss"] > 0


def test_noise_on_the_embeddings_reaches_the_loss_and_not_the_text(train, student):
    def run(**settings) -> tuple[float, list]:
        student.load_state_dict(weights)
        trainer, written = train(max_steps=1, lmbda=1.0, **settings), []
        windows = trainer._windows
        write = windows.written_by
        windows.written_by = lambda *args: written.extend(batches := write(*args)) or batches
        trainer.train()
        return trainer.state.log_history[0]["loss"], [batch["input_ids"] for batch in written]

    weights = {name: value.clone() for name, value in student.state_dict().items()}
    (loss, text), (noisy, noisy_text) = run(), run(neftune_noise_alpha=50.0)
    assert abs(loss - noisy) > 1e-3
    assert all(map(torch.equal, text, noisy_text))


def test_rows_of_like_length_share_a_batch_if_asked_for(train):
    trainer = train(train_sampling_strategy="group_by_length", max_steps=4)
    trainer.train()
    assert type(trainer._get_train_sampler()).__name__ == "LengthGroupedSampler"


@pytest.mark.filterwarnings("ignore:.*use_liger_kernel.*:FutureWarning")
def test_ligers_layers_are_applied_without_its_loss(train, monkeypatch):
    applied = []
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, config: applied.append(config))
    train(use_liger_kernel=True, liger_kernel_config={"rope": True}, max_steps=1).train()
    assert applied == [{"rope": True, "fused_linear_cross_entropy": False}]
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        train(use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})


# ---- DistillationConfig ----
