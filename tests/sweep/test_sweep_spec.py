"""What a sweep may not say is an error that names it, before anything is trained."""

import pytest
from sweeping import BASE, CONTENT, written

from amid_trl.sweep.spec import Choice, Range, check_space, read_sweep


def test_a_trial_is_the_base_with_its_parameters_the_seed_and_the_budget(tmp_path):
    sweep, asked = read_sweep(written(tmp_path, CONTENT))
    parameters = {"assistant_alpha": -1.5, "learning_rate": 1e-3, "divergence": "js", "text": "given"}
    assert sweep.settings(parameters) == {
        "config": {
            **BASE,
            **{"assistant_alpha": -1.5, "learning_rate": 1e-3, "divergence": "js", "lmbda": 0.0, "seq_kd": True},
            **{"seed": 0, "max_steps": 10},
        },
        "budget": {"steps": 10},
        "evaluates": True,
        "evaluated_after": [2, 5, 7],
    }
    assert sweep.direction == "minimize"
    assert asked["space"] == CONTENT["space"] and "trials" not in asked


def test_axes_are_ranges_values_and_sets_of_settings():
    assert Range.parse("x", {"low": 1, "high": 9, "integer": True, "step": 2}).ends == (1, 9)
    lists = Choice.of_values("x", [{"a": 1}, None, 2])
    assert lists.ends == ('{"a": 1}', None, 2)
    assert lists.settings('{"a": 1}') == {"x": {"a": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "eval_loss"}, "metric: no run reports 'eval_loss'; there are eval_kl, "),
        ({"metric": "rougeL"}, "no run reports 'rougeL'; amid-trl evaluate measures it, not a training"),
        ({"metric": "eval_student_entropy"}, "eval_student_entropy is neither better nor worse: give a direction"),
        ({"direction": "up"}, "direction must be one of minimize, maximize; got 'up'"),
        ({"sampler": "grid"}, "sampler must be one of tpe, random; got 'grid'"),
        ({"pruner": True}, "pruner must be a name; got True"),
        ({"trials": 0}, "trials must be given"),
        ({"trials": -1}, "trials must be at least 1; got -1"),
        ({"trials": 2.5}, "trials must be a whole number; got 2.5"),
        ({"budget": {"minutes": 3}}, "budget must be {steps: N}.* got {'minutes': 3}"),
        ({"budget": {"steps": 0}}, "budget must be {steps: N}"),
        ({"evaluations": 11}, "evaluations must be at most the 10 steps; got 11"),
        ({"resources": {"tpu": 1}}, "resources may have cpu and gpu.* got tpu: 1"),
        ({"runs": {}}, "unknown keys runs; there are base, space, "),
        ({"base": {**BASE, "seed": 3}}, "base may not have seed"),
        ({"base": {**BASE, "dataloader_drop_last": True}}, "dataloader_drop_last leaves out rows"),
        ({"space": {}}, "space must be given"),
        ({"space": {"divergence": ["kl"]}}, "space.divergence must have two values or more"),
        ({"space": {"divergence": ["kl", "kl"]}}, "space.divergence must have two values or more, all different"),
        ({"space": {"divergence": "kl"}}, "space.divergence must be a list of values, a range"),
        ({"space": {"text": {"own": {"lmbda": 1.0}}}}, "space.text must be .* two mappings of settings"),
        ({"space": {"assistant_lambda": {"low": 0.5}}}, "space.assistant_lambda: low, high and step must be finite"),
        ({"space": {"assistant_lambda": {"low": 0.5, "high": 0.5}}}, "low must be below high; got 0.5 and 0.5"),
        ({"space": {"learning_rate": {"low": 0, "high": 1, "log": True}}}, "with log low must be positive"),
        (
            {"space": {"lmbda": {"low": 0, "high": 1, "step": 2}}},
            "step must be positive and at most high - low; got 2",
        ),
        ({"space": {"lmbda": {"low": 0, "hight": 1}}}, "space.lmbda: unknown hight; a range has low, high, "),
        ({"space": {"warmup_steps": {"low": 0.5, "high": 9, "integer": True}}}, "must be whole numbers"),
        ({"space": {"output_dir": ["a", "b"]}}, "space.output_dir may not have output_dir: the sweep sets it"),
        ({"space": {"per_device_train_batch_size": [2, 4]}}, "with another per_device_train_batch_size a trial does"),
        ({"space": {"num_processes": [1, 2]}}, "with another num_processes a trial does"),
        ({"space": {"text": {"a": {}, "b": {"dataloader_drop_last": True}}}}, "dataloader_drop_last leaves out rows"),
        ({"space": {"text": {True: {"lmbda": 1.0}, False: {"lmbda": 0.0}}}}, "space.text: a label is text.* got True"),
        ({"space": {"text": {1: {"lmbda": 1.0}, "b": {"lmbda": 0.0}}}}, "space.text: a label is text.* got 1"),
        ({"space": {"teacher_ema": [0.5, 0.9]}}, "eval_kl compares with the teacher; teacher_ema has to stay"),
        (
            {"space": {"lmbda": [0.0, 1.0], "text": {"a": {"lmbda": 1.0}, "b": {}}}},
            "space.lmbda and space.text both have lmbda",
        ),
    ],
)
def test_what_a_sweep_may_not_say(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_sweep(written(tmp_path, {**CONTENT, **change}))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"assistant_lambda": {"low": 0, "high": 1.5}},
            r"space.assistant_lambda=1.5: assistant_lambda must be a number",
        ),
        (
            {"assistant_lamda": {"low": 0, "high": 1}},
            "space.assistant_lamda=0.0: unknown arguments: --assistant_lamda",
        ),
        ({"divergence": ["kl", "kll"]}, "space.divergence=kll: divergence must be one of kl, "),
        ({"objective": ["kd", "kdd"]}, "space.objective=kdd: unknown objective 'kdd'; there are kd, "),
        (
            {"objective": ["amid", "kd"], "assistant_alpha": {"low": -5, "high": 1}},
            "space.objective=kd: assistant_alpha has no effect on objective='kd'",
        ),
    ],
)
def test_a_field_that_is_unknown_or_outside_its_domain_is_named(tmp_path, tiny_dir, space, message):
    base = {**BASE, "model_name_or_path": str(tiny_dir), "teacher_model_name_or_path": str(tiny_dir)}
    base["dataset_name"] = str(tmp_path)
    sweep, _ = read_sweep(written(tmp_path, {**CONTENT, "base": base, "space": space}))
    with pytest.raises(ValueError, match=message):
        check_space(sweep)
