"""A script for TRL's DistillationTrainer runs with the two names swapped, and is told what differs."""

import dataclasses

import pytest
from observe import field_names, unclassified
from tiny import (
    chat_prompt_only_dataset,
    messages_dataset,
    prompt_completion_dataset,
    prompt_only_dataset,
)
from transformers import TrainingArguments
from trl import DistillationConfig, TrlParser
from trl.import_utils import suppress_experimental_warning

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl._trl import GKDConfig
from amid_trl.training.inherited import (
    DISTILLATION_DEFAULTS,
    DISTILLATION_DIFFERS,
    NOT_OF_DISTILLATION,
    NOT_OF_GOLD,
    NOT_OURS,
)


DISTILLATION = field_names(DistillationConfig) - field_names(TrainingArguments)


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
    for name in unclassified(DISTILLATION, GIVEN, NOT_OF_DISTILLATION):
        pytest.fail(f"DistillationConfig has a field {name} that nobody has classified (here, or in inherited.py)")
    assert set(NOT_OF_DISTILLATION) | set(DISTILLATION_DIFFERS) <= DISTILLATION
    assert not set(NOT_OURS) & set(DISTILLATION_DIFFERS) and not set(NOT_OURS) & field_names(AMiDConfig)


def test_every_field_of_gold_config_is_ours_or_refused():
    with suppress_experimental_warning():
        from trl.experimental.gold import GOLDConfig
    gold = field_names(GOLDConfig)
    assert gold - field_names(AMiDConfig) == set(NOT_OF_GOLD)
    assert not set(NOT_OF_GOLD) & DISTILLATION


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


@pytest.mark.parametrize("name", sorted(DISTILLATION - field_names(GKDConfig) - set(NOT_OF_DISTILLATION)))
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
