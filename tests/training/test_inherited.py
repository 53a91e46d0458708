"""What becomes of the fields that AMiDConfig inherits, and of those that scripts for DistillationTrainer set."""

import dataclasses
import re

import pytest
import torch
from tiny import (
    chat_prompt_only_dataset,
    messages_dataset,
    prompt_completion_dataset,
    prompt_only_dataset,
    text_dataset,
)
from transformers import TrainingArguments
from trl import DistillationConfig, SFTConfig, TrlParser

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl._trl import GKDConfig
from amid_trl.training.inherited import DISTILLATION_DEFAULTS, DISTILLATION_DIFFERS, HONOURED, NOT_OURS, REFUSED


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


def names(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def unclassified(fields: set[str], *classes) -> list[str]:
    """Fields that are in no class, or in several."""
    return sorted(name for name in fields if sum(name in one for one in classes) != 1)


OWN = names(SFTConfig) - names(TrainingArguments)


def test_every_field_of_sft_config_is_honoured_or_refused():
    for name in unclassified(OWN, HONOURED, REFUSED):
        pytest.fail(f"SFTConfig has a field {name} that nobody has classified (amid_trl/training/inherited.py)")
    assert set(HONOURED) <= OWN


def test_every_field_of_training_arguments_is_left_to_transformers_or_refused():
    for name in unclassified(names(TrainingArguments), OF_TRANSFORMERS.split(), REFUSED):
        pytest.fail(f"TrainingArguments has a field {name} that nobody has classified (here, or in inherited.py)")
    # Older releases that setup.py admits have not all of the others, but what the config reads must be there.
    assert set(REFUSED) <= names(TrainingArguments) | OWN


def test_a_field_that_nobody_knows_is_found():
    assert unclassified({"packing", "new"}, HONOURED, REFUSED) == ["new"]
    assert unclassified({"packing"}, {"packing"}, REFUSED) == ["packing"]


# A value of each field that is not accepted.
REFUSED_VALUES = {
    "packing": True,
    "eval_packing": True,
    "packing_strategy": "wrapped",
    "padding_free": True,
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
        windows = trainer._parts.windows
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

DISTILLATION = names(DistillationConfig) - names(TrainingArguments)

# A value of every field that we have, other than the default.
GIVEN = {
    "model_init_kwargs": {"dtype": "float32"},
    "trust_remote_code": True,
    "teacher_model_name_or_path": "teacher",
    "teacher_model_revision": "v2",
    "teacher_model_init_kwargs": {"dtype": "float32"},
    "disable_dropout": False,
    "max_completion_length": 64,
    "ds3_gather_for_generation": False,
    "shuffle_dataset": True,
    "pad_to_multiple_of": 8,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "generation_kwargs": {"no_repeat_ngram_size": 3},
    "chat_template_kwargs": {"enable_thinking": False},
    "repetition_penalty": 1.1,
    "cache_implementation": "static",
    "use_vllm": True,
    "vllm_mode": "server",
    "vllm_model_impl": "transformers",
    "vllm_enable_sleep_mode": True,
    "vllm_structured_outputs_regex": "yes|no",
    "vllm_server_base_url": "http://host:1",
    "vllm_server_host": "host",
    "vllm_server_port": 1,
    "vllm_server_timeout": 1.0,
    "vllm_group_port": 1,
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_max_model_length": 2048,
    "vllm_tensor_parallel_size": 2,
    "beta": 0.3,
    "log_completions": True,
    "num_completions_to_print": 3,
}


def test_every_field_of_distillation_config_is_taken_or_refused():
    for name in unclassified(DISTILLATION, GIVEN, NOT_OURS):
        pytest.fail(f"DistillationConfig has a field {name} that nobody has classified (here, or in inherited.py)")
    assert set(NOT_OURS) | set(DISTILLATION_DIFFERS) <= DISTILLATION
    assert not set(NOT_OURS) & set(DISTILLATION_DIFFERS) and not set(NOT_OURS) & names(AMiDConfig)


@pytest.mark.parametrize("name", GIVEN)
def test_a_field_of_distillation_config_is_taken(name):
    settings = {name: GIVEN[name]}
    if name.startswith("vllm"):
        settings["use_vllm"] = True
    if name.startswith(("vllm_server", "vllm_group")):
        settings["vllm_mode"] = "server"
    config = AMiDConfig("unused", use_cpu=True, **settings)
    assert getattr(config, "max_new_tokens" if name == "max_completion_length" else name) == GIVEN[name]


@pytest.mark.parametrize("name", NOT_OURS)
def test_a_field_that_we_have_not_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"AMiDConfig has no {name}: "):
        AMiDConfig("unused", use_cpu=True, **{name: None})


@pytest.mark.parametrize("rows", [prompt_only_dataset, chat_prompt_only_dataset])
def test_a_script_for_distillation_trainer_runs_with_the_two_names_replaced(tmp_path, tiny_dir, caplog, rows):
    trainer = AMiDTrainer(
        model=str(tiny_dir),
        args=AMiDConfig(
            output_dir=str(tmp_path),
            teacher_model_name_or_path=str(tiny_dir),
            max_completion_length=5,
            temperature=1.0,
            top_p=0.95,
            top_k=0,
            beta=1.0,
            objective="gkd",
            disable_dropout=False,
            log_completions=True,
            num_completions_to_print=1,
            learning_rate=1e-6,
            per_device_train_batch_size=2,
            max_steps=2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=rows(8),
    )
    said = [record.getMessage() for record in caplog.records if record.name == "amid_trl.training.config"]
    assert said == [
        "If this was a DistillationConfig (log_completions, max_completion_length, num_completions_to_print, top_k, "
        "top_p): what was not given has other defaults here: shuffle_dataset False (True there), "
        "lmbda 0.5 (1.0 there).",
        "The training set has prompts without answers: the student writes every window (lmbda=1.0).",
    ]
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["on_policy_share"] for log in logs] == [1.0, 1.0]
    assert all(0 < log["completions/mean_length"] <= 5 for log in logs)
    assert trainer.lmbda == trainer.args.lmbda == 1.0


def test_who_gives_preferences_is_told_how_to_train_on_them(tmp_path, student, teacher, tokenizer, caplog):
    config = AMiDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    rows = prompt_only_dataset(4)
    rows = rows.add_column("chosen", ["Yes."] * 4).add_column("rejected", ["No."] * 4)
    with caplog.at_level("WARNING", logger="amid_trl.training.config"):
        AMiDTrainer(student, teacher, config, train_dataset=rows, processing_class=tokenizer)
        assert "To train on its preferred answers, rename_column('chosen', 'completion')." in caplog.text
        caplog.clear()
        trained = rows.rename_column("chosen", "completion")
        trainer = AMiDTrainer(student, teacher, config, train_dataset=trained, processing_class=tokenizer)
    assert "prompts without answers" not in caplog.text and trainer.args.lmbda == 0.5


def test_the_callers_settings_are_left_alone(tmp_path, student, teacher, tokenizer):
    config = AMiDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    rows = prompt_only_dataset(4)
    trainer = AMiDTrainer(student, teacher, config, train_dataset=rows, processing_class=tokenizer)
    assert (config.lmbda, trainer.args.lmbda) == (0.5, 1.0)


@pytest.mark.parametrize("settings", [{"lmbda": 0.4}, {"lmbda_schedule": {"kind": "constant", "value": 0.5}}])
def test_a_share_that_was_set_is_not_replaced(train, settings):
    with pytest.raises(ValueError, match=r"no row can be used.*nothing to train on"):
        train(train_dataset=prompt_only_dataset(4), **{"lmbda": 0.5, **settings})


def test_adaptive_runs_need_answers(train):
    adaptive = {"sampling": "adaptive", "eval_strategy": "steps", "lmbda": 0.5, "eval_dataset": messages_dataset(2)}
    with pytest.raises(ValueError, match=r"no row can be used.*nothing to train on"):
        train(train_dataset=prompt_only_dataset(4), **adaptive)


@pytest.mark.parametrize("rows", [messages_dataset, prompt_completion_dataset])
def test_the_default_share_stays_where_there_are_answers(train, rows):
    assert train(train_dataset=rows(4), lmbda=0.5).args.lmbda == 0.5


def test_the_teacher_may_write_where_there_are_prompts_alone(train):
    assert train(train_dataset=prompt_only_dataset(4), lmbda=0.5, seq_kd=True).args.lmbda == 0.5


def test_a_stream_of_prompts_is_written_by_the_student(train):
    trainer = train(train_dataset=prompt_only_dataset(4).to_iterable_dataset(), lmbda=0.5)
    assert trainer.args.lmbda == 1.0


LEFT = {
    "temperature": "temperature 0.9 (1.0 there, and in its loss too)",
    "learning_rate": "learning_rate 2e-05 (1e-06 there)",
    "disable_dropout": "disable_dropout True (False there)",
    "shuffle_dataset": "shuffle_dataset False (True there)",
    "max_new_tokens": "max_new_tokens 128 (512 there)",
    "lmbda": "lmbda 0.5 (1.0 there)",
    "objective": "objective amid (gkd there)",
}


def told_of_defaults(caplog, **given) -> list[str]:
    """What a config that is made of these fields says of DistillationConfig's defaults."""
    AMiDConfig("unused", use_cpu=True, bf16=False, **given)
    said = [each.getMessage() for each in caplog.records if "If this was a DistillationConfig" in each.getMessage()]
    caplog.clear()
    return said


@pytest.mark.parametrize("name", sorted(DISTILLATION - names(GKDConfig) - set(NOT_OURS)))
def test_what_was_not_given_is_named_with_any_name_that_gkd_has_not(caplog, name):
    engine = {"use_vllm": True} if name.startswith("vllm") else {}
    engine |= {"vllm_mode": "server"} if name.startswith(("vllm_server", "vllm_group")) else {}
    used, left = engine | {name: GIVEN[name]}, dict(LEFT)
    if name == "max_completion_length":
        del left["max_new_tokens"]
    want = (
        f"If this was a DistillationConfig ({', '.join(sorted(used))}): what was not given has other defaults here: "
    )
    assert told_of_defaults(caplog, **used) == [want + ", ".join(left.values()) + "."]
    given = {**used, "learning_rate": 1e-5, "temperature": 1.0, "beta": 1.0}
    [left.pop(name) for name in ("learning_rate", "temperature")]
    assert told_of_defaults(caplog, **given) == [want + ", ".join(left.values()) + "."]


def test_beta_is_named_where_it_is_read(caplog):
    [said] = told_of_defaults(caplog, max_completion_length=64, objective="gkd")
    assert said.endswith("lmbda 0.5 (1.0 there), beta 0.5 (1.0 there).")


def test_their_defaults_are_those_of_the_installed_version():
    theirs = {field.name: field.default for field in dataclasses.fields(DistillationConfig)}
    theirs |= {"max_new_tokens": theirs["max_completion_length"], "lmbda": 1.0, "objective": "gkd"}
    assert {name: theirs[name] for name in DISTILLATION_DEFAULTS} == DISTILLATION_DEFAULTS


@pytest.mark.parametrize(
    "given",
    [
        {"learning_rate": 1e-5, "temperature": 0.7},  # anybody's names
        {"max_new_tokens": 64, "top_p": 0.9},  # names that DistillationConfig has not
        {"objective": "amid", "log_completions": True},
        {**DISTILLATION_DEFAULTS, "max_new_tokens": 64, "max_completion_length": 64},
    ],
)
def test_nothing_is_said_where_no_names_were_swapped_or_all_is_given(caplog, given):
    assert told_of_defaults(caplog, **given) == []


def test_a_parsers_defaults_count_as_not_given(caplog):
    given = ["--output_dir=unused", "--use_cpu", "--bf16=False", "--max_completion_length=64", "--learning_rate=1e-6"]
    TrlParser(AMiDConfig).parse_args_and_config(given)
    [said] = [each.getMessage() for each in caplog.records if each.name == "amid_trl.training.config"]
    assert "temperature 0.9" in said and "learning_rate" not in said
    caplog.clear()
    TrlParser(AMiDConfig).parse_args_and_config([*given[:3], "--top_p=0.9", "--max_new_tokens=64"])
    TrlParser(AMiDConfig).parse_args_and_config(given[:3])
    assert not [each for each in caplog.records if each.name == "amid_trl.training.config"]
