"""AMiDConfig: defaults, command line, and that no field is without effect."""

import ast
import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from trl import TrlParser

from amid_trl import AMiDConfig, Objective
from amid_trl._trl import GKDConfig
from amid_trl.fields import build_schedule
from amid_trl.sources.fields import VLLM_COLOCATE_FIELDS, VLLM_SERVER_FIELDS
from amid_trl.training.config import data_settings
from amid_trl.training.objective_fields import build_objective


OWN_FIELDS = [
    f.name for f in dataclasses.fields(AMiDConfig) if f.name not in {g.name for g in dataclasses.fields(GKDConfig)}
]


def config(**settings) -> AMiDConfig:
    return AMiDConfig(output_dir="unused", use_cpu=True, **settings)


def test_the_default_is_the_papers_best_setting():
    assert build_objective(config()) == Objective("ab", "pr", alpha=-5.0, lam=0.1, divergence_kwargs={})
    from amid_trl.maths.divergences import alpha_beta

    p, q = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.2, 0.5, 0.3]]).log()
    torch.testing.assert_close(alpha_beta(p, q), alpha_beta(p, q, alpha=0.2, beta=0.7))


def test_gkds_fields_keep_their_defaults():
    defaults = {f.name: f.default for f in dataclasses.fields(GKDConfig)}
    changed = {f.name for f in dataclasses.fields(AMiDConfig) if f.name in defaults and f.default != defaults[f.name]}
    assert changed == {"include_num_input_tokens_seen"}


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"assistant_alpha": 0.5}, {"alpha": 0.5}),
        ({"assistant_alpha": -math.inf}, {"alpha": -math.inf}),
        ({"assistant_lambda": 0.3}, {"lam": 0.3}),
        ({"divergence": "kl"}, {"divergence": "kl"}),
        ({"divergence_order": "qr"}, {"order": "qr"}),
        ({"divergence_kwargs": {"alpha": 1.0}}, {"divergence_kwargs": {"alpha": 1.0}}),
        ({"divergence_kwargs": '{"alpha": 1.0}'}, {"divergence_kwargs": {"alpha": 1.0}}),
        ({"distill_temperature": 2.0}, {"temperature": 2.0}),
        ({"objective": "skl"}, {"alpha": -1.0, "lam": 0.1, "divergence": "kl", "order": "pr"}),
        ({"objective": "skl", "objective_kwargs": {"skew": 0.3}}, {"lam": 0.3}),
        ({"objective": "gkd", "beta": 0.2}, {"divergence_kwargs": {"beta": 0.2}}),
    ],
)
def test_fields_reach_the_objective(settings, want):
    objective = build_objective(config(**settings))
    assert {name: getattr(objective, name) for name in want} == want


UP = {"kind": "linear", "start": 0.1, "end": 0.9}
ADAPTIVE = {"sampling": "adaptive", "eval_strategy": "epoch"}

REFUSED = [
    ({"objective": "nope"}, r"objective must be one of kd, .*got 'nope'"),
    ({"divergence": "nope"}, r"divergence must be one of kl, .*got 'nope'"),
    ({"divergence_order": "xy"}, r"order must be one of pr, .*got 'xy'"),
    ({"divergence_kwargs": {"gamma": 1.0}}, r"divergence_kwargs of ab may have alpha, beta; got 'gamma'"),
    ({"assistant_lambda": 1.5}, r"assistant_lambda must be a number in \[0, 1\]; got 1.5"),
    ({"assistant_lambda": math.nan}, r"assistant_lambda must be a number in \[0, 1\]; got nan"),
    ({"assistant_lambda": None}, r"assistant_lambda must be a number in \[0, 1\]; got None"),
    ({"assistant_alpha": math.nan}, r"assistant_alpha must be a real number.*got nan"),
    ({"assistant_alpha": "-5"}, r"assistant_alpha must be a real number.*got '-5'"),
    ({"lmbda": 1.5}, r"lmbda must be a number in \[0, 1\]; got 1.5"),
    ({"lmbda": math.nan}, r"lmbda must be a number in \[0, 1\]; got nan"),
    ({"beta": -0.1}, r"beta must be a number in \[0, 1\]; got -0.1"),
    ({"distill_temperature": 0.0}, r"distill_temperature must be a positive, finite number; got 0.0"),
    ({"temperature": 0.0}, r"temperature must be a positive, finite number; got 0.0"),
    ({"temperature": -1.0}, r"temperature must be a positive, finite number; got -1.0"),
    ({"token_selection": "best"}, r"token_selection must be one of prefix, .*got 'best'"),
    ({"token_selection": "tip", "token_selection_share": 1.0}, r"token_selection_share must be .* got 1.0"),
    ({"token_selection": "tip", "token_selection_count": 0}, r"token_selection_count must be at least 1; got 0"),
    ({"token_selection_share": 0.2}, r"token_selection_share has no effect without token_selection"),
    (
        {"token_selection": "tip", "token_selection_count": 9, "token_selection_share": 0.2},
        r"token_selection_share has no effect beside token_selection_count",
    ),
    ({"sft_weight": -0.1}, r"sft_weight must be a finite number, 0 or more; got -0.1"),
    ({"generation_kwargs": {"num_return_sequences": 2}}, r"generation_kwargs may have .*got 'num_return_sequences'"),
    ({"generation_kwargs": {"max_new_tokens": 300}}, r"generation_kwargs may have .*got 'max_new_tokens'"),
    ({"generation_kwargs": {"top_kk": 3}}, r"generation_kwargs may have .*got 'top_kk'"),
    ({"objective": "gkd", "objective_kwargs": {"beta": 0.9}}, r"takes its beta from the field beta"),
    ({"max_new_tokens": 0}, r"max_new_tokens must be at least 1; got 0"),
    ({"generation_batch_size": 0}, r"generation_batch_size must be at least 1; got 0"),
    ({"logits_chunk_size": 0}, r"logits_chunk_size must be at least 1; got 0"),
    ({"top_k": -1}, r"top_k must be at least 0; got -1"),
    ({"top_p": 1.1}, r"top_p and min_p must be at most 1"),
    ({"min_p": 2.0}, r"top_p and min_p must be at most 1"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty must be a positive, finite number"),
    ({"assistant_turns": "first"}, r"assistant_turns must be 'all' or 'last'; got 'first'"),
    ({"objective": "kd", "assistant_alpha": 1.0}, r"assistant_alpha has no effect on objective='kd'"),
    ({"objective_kwargs": {"alpha": 1}}, r"objective_kwargs=.* has no effect on objective='amid'"),
    ({"objective": "skl", "objective_kwargs": {"skw": 1}}, r"objective_kwargs=.* does not fit 'skl'"),
    ({"objective": "skl", "student_text_objective": "nope"}, r"student_text_objective must be one of .*got 'nope'"),
    (
        {"student_text_objective": "srkl", "student_text_objective_kwargs": {"skw": 1}},
        r"student_text_objective_kwargs={'skw': 1} does not fit 'srkl'",
    ),
    ({"student_text_objective_kwargs": {"skew": 0.1}}, r"_kwargs has no effect without student_text_objective"),
    ({"student_text_objective": "srkl", "lmbda": 0.0}, r"has no effect on a run without student text; set lmbda"),
    (
        {"assistant_lambda_schedule": {"kind": "taid"}, "student_text_objective": "srkl"},
        r"TAID's λ follows the loss of one objective",
    ),
    ({"assistant_lambda_schedule": {"kind": "linear", "start": 0.1}}, r"assistant_lambda_schedule of kind 'linear'"),
    ({"assistant_lambda_schedule": {**UP, "end": 1.5}}, r"end of assistant_lambda_schedule must be .*got 1.5"),
    ({"assistant_lambda_schedule": "linear"}, r"assistant_lambda_schedule must be a dict.*got 'linear'"),
    ({"assistant_alpha_schedule": {**UP, "end": math.inf}}, r"assistant_alpha_schedule .*needs finite numbers"),
    ({"lmbda_schedule": {**UP, "start": -0.1}}, r"start of lmbda_schedule must be .*got -0.1"),
    ({"lmbda_schedule": {"kind": "taid"}}, r"lmbda_schedule must be a dict .*one of constant, linear, cosine; got"),
    ({"lmbda_schedule": UP, "lmbda": 0.7}, r"lmbda has no effect beside lmbda_schedule"),
    ({"assistant_alpha_schedule": UP, "assistant_alpha": 1.0}, r"assistant_alpha has no effect beside"),
    ({"assistant_lambda_schedule": UP, "assistant_lambda": 0.2}, r"assistant_lambda has no effect beside"),
    ({"assistant_lambda_schedule": UP, "objective": "kd"}, r"has no effect: this objective compares without"),
    (
        {"assistant_alpha_schedule": UP, "objective": "skl"},
        r"assistant_alpha_schedule has no effect on objective='skl'",
    ),
    (
        {"assistant_lambda_schedule": UP, "objective": "skl", "objective_kwargs": {"skew": 0.2}},
        r"objective_kwargs={'skew': 0.2} fixes what assistant_lambda_schedule moves",
    ),
    ({"sampling": "on-policy"}, r"sampling must be 'mixed' or 'adaptive'; got 'on-policy'"),
    ({"sampling_block_size": 0}, r"sampling_block_size must be at least 1; got 0"),
    ({"adaptive_threshold": 0.1}, r"adaptive_threshold has no effect on sampling='mixed'"),
    ({"replay_share": "constant", "replay_capacity": 9}, r"replay_share, replay_capacity has no effect"),
    ({**ADAPTIVE, "lmbda": 0.7}, r"lmbda has no effect on sampling='adaptive'; set adaptive_threshold"),
    ({**ADAPTIVE, "lmbda_schedule": UP}, r"lmbda_schedule has no effect on sampling='adaptive'"),
    ({**ADAPTIVE, "adaptive_threshold": 1.5}, r"adaptive_threshold must be a number in \[0, 1\]; got 1.5"),
    ({**ADAPTIVE, "adaptive_tolerance": -1.0}, r"adaptive_tolerance must be a number"),
    ({**ADAPTIVE, "adaptive_step": 2.0}, r"adaptive_step must be a number"),
    ({**ADAPTIVE, "replay_share": "rising"}, r"replay_share must be one of constant, increasing, decreasing; got"),
    (
        {**ADAPTIVE, "replay_capacity": 31, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
        r"replay_capacity=31 is smaller than a window: one process trains on 32 rows",
    ),
    ({"sampling": "adaptive"}, r"sampling='adaptive' follows the loss of the evaluation set; set eval_strategy"),
    ({"eval_packing": True}, r"does not support eval_packing=True"),
    ({"packing": True, "sampling": "adaptive", "eval_strategy": "steps"}, r"packing=True leaves open how many rows"),
    ({"loss_type": "dft"}, r"does not support loss_type='dft'"),
    ({"label_smoothing_factor": 0.1}, r"does not support label_smoothing_factor=0.1"),
    ({"torch_compile": True}, r"does not support torch_compile=True"),
    ({"enable_jit_checkpoint": True}, r"does not support enable_jit_checkpoint=True: SIGTERM saves a checkpoint"),
    ({"router_aux_loss_coef": -0.1}, r"router_aux_loss_coef must be a finite number, 0 or more; got -0.1"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_what_cannot_work_is_refused_with_its_name_and_value(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"bf16": False, "bf16_full_eval": True}], ids=str)
def test_without_bfloat16_the_error_says_what_to_add(settings, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"doesn't support bf16.* add --use_cpu --bf16 False \(use_cpu=True, bf16=False\)"
    ):
        AMiDConfig("unused", **settings)
    AMiDConfig("unused", use_cpu=True, bf16=False)


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
def test_cutting_prompts_is_refused():
    with pytest.raises(ValueError, match="does not support truncation_mode='keep_end'"):
        config(truncation_mode="keep_end")


def test_a_beta_that_the_objective_does_not_read_is_reported(caplog):
    config(beta=0.1)
    assert "beta=0.1 belongs to objective='gkd'" in caplog.text
    caplog.clear()
    config(beta=0.1, objective="gkd")
    assert not caplog.text


def settings_of(**fields):
    return data_settings(config(**fields), positions=512, evaluates=False, eos_token_ids=(), formatting_func=None)


def test_lengths_are_bounded_by_max_length_and_the_models_positions():
    assert settings_of(max_length=1024, lmbda=0.0).max_length == 512
    assert settings_of(max_length=300, lmbda=0.0).max_length == 300
    assert settings_of(max_length=None, lmbda=0.0).max_length == 512
    assert settings_of(max_length=300, lmbda=1.0, max_new_tokens=100).prompt_budget == 200
    assert settings_of(max_length=300, lmbda=0.0, max_new_tokens=100).prompt_budget is None


def test_prompts_are_bounded_if_the_student_may_ever_write():
    assert settings_of(lmbda_schedule={"kind": "linear", "start": 0.0, "end": 0.5}).generates
    assert not settings_of(lmbda_schedule={"kind": "constant", "value": 0.0}).generates
    assert settings_of(**ADAPTIVE).generates


def test_data_is_trained_unless_every_window_is_generated():
    assert settings_of(lmbda=0.5).trains_on_dataset
    assert not settings_of(lmbda=1.0).trains_on_dataset
    assert not settings_of(seq_kd=True).trains_on_dataset
    assert settings_of(lmbda_schedule={"kind": "linear", "start": 1.0, "end": 0.5}).trains_on_dataset
    assert settings_of(**ADAPTIVE).trains_on_dataset
    assert not settings_of(**ADAPTIVE, adaptive_threshold=1.0).trains_on_dataset
    evaluation = data_settings(
        config(lmbda=1.0), positions=512, evaluates=True, eos_token_ids=(), formatting_func=None
    )
    assert evaluation.trains_on_dataset and not evaluation.generates


def test_distillation_configs_name_of_the_length():
    assert config(max_completion_length=64).max_new_tokens == 64
    assert config(max_completion_length=64, max_new_tokens=64).max_completion_length is None
    with pytest.raises(ValueError, match="max_completion_length=64 and max_new_tokens=32 are one setting"):
        config(max_completion_length=64, max_new_tokens=32)


@pytest.mark.parametrize("name", ["max_tool_calling_iterations", "log_unique_prompts"])
def test_what_distillation_config_has_and_we_have_not_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"AMiDConfig has no {name}: "):
        config(**{name: None})


# Every field of ours, and the test that fails if it stops having an effect.
EFFECTS = {
    "teacher_tokenizer_name_or_path": "training/test_other_tokenizer.py::test_a_teacher_in_memory_has_it_by_name",
    "eval_generate": "training/test_answers.py::test_answers_are_greedy_and_scored_against_the_datasets",
    "nonfinite_loss": "training/test_nonfinite.py::test_skipping_gives_the_gradient_of_the_other_micro_batches",
    "teachers": "teacher/test_several.py::test_the_gradient_of_a_window_is_that_of_each_rows_own_teacher",
    "teacher_load_in_8bit": "teacher/test_placement.py::test_a_quantised_teacher_trains_a_student",
    "teacher_load_in_4bit": "teacher/test_placement.py::test_a_quantised_teacher_trains_a_student",
    "teacher_offload": "teacher/test_placement.py::test_an_offloaded_teacher_gives_the_numbers_of_one_that_stays",
    "teacher_deepspeed": "engines/test_zero.py::test_a_teacher_has_an_engine_of_its_own",
    "objective": "training/test_config.py::test_fields_reach_the_objective",
    "objective_kwargs": "training/test_config.py::test_fields_reach_the_objective",
    "assistant_alpha": "training/test_config.py::test_fields_reach_the_objective",
    "assistant_lambda": "training/test_config.py::test_fields_reach_the_objective",
    "divergence": "training/test_config.py::test_fields_reach_the_objective",
    "divergence_order": "training/test_config.py::test_fields_reach_the_objective",
    "divergence_kwargs": "training/test_config.py::test_fields_reach_the_objective",
    "distill_temperature": "training/test_config.py::test_fields_reach_the_objective",
    "assistant_alpha_schedule": "training/test_run_objective.py::test_every_window_is_trained_with_its_objective",
    "assistant_lambda_schedule": "training/test_run_objective.py::test_every_window_is_trained_with_its_objective",
    "student_text_objective": "training/test_run_objective.py::test_every_window_is_trained_with_its_objective",
    "student_text_objective_kwargs": "training/test_run_objective.py::test_the_objective_of_a_source",
    "lmbda_schedule": "sources/test_shares.py::test_a_schedule_moves_the_share_in_training_and_is_logged",
    "sampling": "sources/test_shares.py::test_replayed_rows_are_those_that_the_student_wrote_token_for_token",
    "sampling_block_size": "sources/test_shares.py::test_blocks_have_their_share_exactly",
    "adaptive_threshold": "sources/test_shares.py::test_an_adaptive_run_has_distillms_shares",
    "adaptive_tolerance": "sources/test_shares.py::test_the_threshold_follows_the_evaluations_of_the_run",
    "adaptive_step": "sources/test_shares.py::test_the_threshold_follows_the_evaluations_of_the_run",
    "replay_share": "sources/test_shares.py::test_an_adaptive_run_has_distillms_shares",
    "replay_capacity": "sources/test_shares.py::test_replayed_rows_are_those_that_the_student_wrote_token_for_token",
    "sft_weight": (
        "training/test_batch_loss.py::"
        "test_cross_entropy_joins_on_dataset_and_teacher_text_and_never_on_the_students_own"
    ),
    **dict.fromkeys(
        ("token_selection", "token_selection_share", "token_selection_count"),
        "training/test_token_selection.py::test_the_loss_is_the_objective_of_the_selected_tokens_of_each_row",
    ),
    "logits_chunk_size": "training/test_fields.py::test_the_chunk_size_bounds_the_projection",
    "teacher_model_revision": "training/test_fields.py::test_the_revision_of_the_teacher_is_asked_for",
    "teacher_chat_template_kwargs": (
        "training/test_context_distillation.py::test_a_template_told_otherwise_is_a_prompt_of_the_teachers"
    ),
    "assistant_turns": "training/test_fields.py::test_only_the_last_turn_is_trained_if_asked_for",
    "chat_template_kwargs": "training/test_fields.py::test_chat_template_kwargs_reach_the_template",
    "max_completion_length": "training/test_config.py::test_distillation_configs_name_of_the_length",
    "top_p": "training/test_fields.py::test_sampling_fields_reach_the_generation_config",
    "top_k": "training/test_fields.py::test_sampling_fields_reach_the_generation_config",
    "min_p": "training/test_fields.py::test_sampling_fields_reach_the_generation_config",
    "repetition_penalty": "training/test_fields.py::test_sampling_fields_reach_the_generation_config",
    "cache_implementation": "training/test_fields.py::test_sampling_fields_reach_the_generation_config",
    "generation_kwargs": "training/test_fields.py::test_sampling_fields_reach_the_generation_config",
    "generation_batch_size": "sources/test_windows.py::test_one_generate_call_serves_a_window_and_the_bound_splits_it",
    "ds3_gather_for_generation": "training/test_fields.py::test_gathering_for_generation_is_passed_on",
    **dict.fromkeys(
        ("teacher_model_server_url", "teacher_top_k"),
        "teacher/test_absent_teacher.py::test_what_the_server_leaves_out_is_logged_and_kl_is_a_lower_bound",
    ),
    "teacher_server_patience": (
        "teacher/test_absent_teacher.py::test_a_server_that_dies_ends_the_run_and_leaves_a_checkpoint_to_resume_from"
    ),
    "teacher_cache": (
        "teacher/test_absent_teacher.py::"
        "test_a_cache_of_the_whole_vocabulary_is_the_teacher_in_memory_but_for_its_rounding"
    ),
    "teacher_adapter_path": "teacher/test_adapter.py::test_an_adapter_of_the_students_base_is_a_teacher_of_its_own",
    "teacher_ema": "teacher/test_moving_average.py::test_the_average_is_the_formulas_and_the_teacher",
    "teacher_cache_dtype": "teacher/test_absent_teacher.py::test_the_command_writes_what_train_reads",
    "teacher_cache_fill": "teacher/test_states_cache.py::test_from_the_second_epoch_on_the_teacher_does_not_run",
    "teacher_cache_states": "teacher/test_states_cache.py::test_the_command_writes_hidden_states_if_asked_to",
    "pretrain_dataset": (
        "training/test_pretraining.py::test_a_dataset_is_named_and_streamed_and_read_on_by_a_resumed_run"
    ),
    "pretrain_dataset_config": "training/test_pretraining.py::test_a_dataset_is_loaded_in_its_configuration",
    "pretrain_weight": "training/test_pretraining.py::test_every_window_has_blocks_of_text_and_their_own_mean",
    "num_generations": "sources/test_writers.py::test_a_window_has_different_completions_of_the_same_prompts",
    "use_vllm": "sources/test_writers.py::test_the_engine_writes_the_students_windows_with_its_weights_of_that_step",
    **dict.fromkeys(("vllm_mode", *VLLM_SERVER_FIELDS), "sources/test_writers.py::test_settings_reach_the_server"),
    **dict.fromkeys(
        ("vllm_structured_outputs_regex", *VLLM_COLOCATE_FIELDS),
        "sources/test_writers.py::test_settings_reach_the_engine",
    ),
    "log_completions": "training/test_trainer.py::test_completions_are_printed_and_saved",
    "num_completions_to_print": "training/test_fields.py::test_the_printed_table_has_the_rows_asked_for",
}


def source_of(test: str, file: Path) -> str:
    """A test with the tables, fixtures and helpers of its file that it comes to by name."""
    text = file.read_text()
    definitions = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = [node, *node.decorator_list]
        elif isinstance(node, ast.Assign):
            definitions |= {target.id: [node] for target in node.targets if isinstance(target, ast.Name)}
    reached, waiting = {}, [test]
    while waiting:
        name = waiting.pop()
        if name in definitions and name not in reached:
            reached[name] = "\n".join(ast.get_source_segment(text, node) for node in definitions[name])
            for node in definitions[name]:
                waiting += [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]
                waiting += [each.arg for each in ast.walk(node) if isinstance(each, ast.arg)]
    return "\n".join(reached.values())


def test_every_field_has_a_test_of_its_effect(request):
    assert sorted(EFFECTS) == sorted(OWN_FIELDS)
    for field, place in EFFECTS.items():
        file, name = place.split("::")
        source = source_of(name, request.path.parents[1] / file)
        assert re.search(rf"\b{field}\b", source), f"{place} does not mention {field}"


def test_a_test_that_does_not_mention_the_field_is_found(request):
    file = request.path.parents[1] / "sources" / "test_shares.py"
    of_replay = source_of("test_replayed_rows_are_those_that_the_student_wrote_token_for_token", file)
    assert '"sampling": "adaptive"' in of_replay  # in a table that a fixture names
    assert "sampling_block_size" not in of_replay  # elsewhere in the file
    assert source_of("test_that_is_not_there", file) == ""


def test_every_field_is_documented_in_the_docstring_and_in_the_help():
    for name in OWN_FIELDS:
        assert name in AMiDConfig.__doc__
    for field in dataclasses.fields(AMiDConfig):
        if field.name in OWN_FIELDS:
            assert field.metadata["help"]


def test_flags_and_yaml_build_the_same_config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "output_dir: out\nuse_cpu: true\nassistant_alpha: -.inf\ndivergence: ab\n"
        "divergence_kwargs: {alpha: 0.3, beta: 0.5}\nlmbda: 1.0\n"
        "assistant_lambda_schedule: {kind: taid, start: 0.2}\n"
    )
    parser = TrlParser(AMiDConfig)
    [from_yaml] = parser.parse_args_and_config(["--config", str(file)])
    [from_flags] = parser.parse_args_and_config(
        [
            "--output_dir=out",
            "--use_cpu",
            "--assistant_alpha=-inf",
            "--divergence_kwargs",
            '{"alpha": 0.3, "beta": 0.5}',
            "--lmbda",
            "1.0",
            "--assistant_lambda_schedule",
            '{"kind": "taid", "start": 0.2}',
        ]
    )
    assert build_schedule(from_yaml, "assistant_lambda") == build_schedule(from_flags, "assistant_lambda")
    assert build_schedule(from_yaml, "assistant_lambda").start == 0.2
    assert build_objective(from_yaml) == build_objective(from_flags)
    assert from_yaml.assistant_alpha == -math.inf and from_yaml.lmbda == from_flags.lmbda == 1.0


def test_unknown_keys_in_yaml_are_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: out\nuse_cpu: true\nassistant_alfa: 1\n")
    with pytest.raises(ValueError, match="assistant_alfa"):
        TrlParser(AMiDConfig).parse_args_and_config(["--config", str(file)])
