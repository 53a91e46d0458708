"""What a sweep may not say is an error that names it, before anything is trained."""

import pytest
from sweeping import BASE, CONTENT, written

from amid_trl import cli
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
def test_a_field_that_is_unknown_or_outside_its_domain_is_named(tmp_path, base, space, message):
    sweep, _ = read_sweep(written(tmp_path, {**CONTENT, "base": base, "space": space}))
    with pytest.raises(ValueError, match=message):
        check_space(sweep)


# ---- What every trial would find ----

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
TEXT = '{"text": "a"}\n'
HERE = "the dataset has no split"


@pytest.fixture
def base(tmp_path, tiny_dir) -> dict:
    """Of models and data that there are."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(2 * CHAT)
    models = {"model_name_or_path": str(tiny_dir), "teacher_model_name_or_path": str(tiny_dir)}
    return {**BASE, **models, "dataset_name": str(tmp_path / "data")}


def check(tmp_path, base: dict, **changes) -> None:
    check_space(read_sweep(written(tmp_path, {**CONTENT, "base": {**base, **changes}}))[0])


def test_data_that_a_trial_can_be_made_of_is_accepted(tmp_path, base):
    check(tmp_path, base)
    part = {"path": "json", "data_files": str(tmp_path / "data" / "train.jsonl")}
    check(tmp_path, {k: v for k, v in base.items() if k != "dataset_name"}, datasets=[part], test_split_size=0.5)


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        ({"test": None}, {}, rf"{HERE} 'test' \(dataset_test_split\); there are train"),
        ({}, {"dataset_train_split": "trian"}, rf"{HERE} 'trian' \(dataset_train_split\); there are train, test"),
        ({"train": None, "test": None}, {}, "dataset_name .* is neither a folder with data nor found on the Hub"),
        ({"test": ""}, {}, "the eval dataset has no rows"),
        (dict.fromkeys(("train", "test"), ""), {}, "dataset_name .* has a file without rows"),
        ({"test": '{"a": "b"}\n'}, {}, "the eval dataset cannot be read: Couldn't cast a: string "),
        (dict.fromkeys(("train", "test"), '{"a": "b"}\n'), {}, "the train dataset has the columns 'a'; needed are"),
        (dict.fromkeys(("train", "test"), TEXT), {"lmbda": 0.5}, "with lmbda > 0.* but the train dataset has none"),
        ({"train": '{"text": '}, {}, "the train dataset cannot be read: JSON parse error"),
        ({}, {"dataset_name": "/no/data"}, "dataset_name '/no/data' is neither a folder with data nor a name on"),
        ({}, {"model_name_or_path": "/no/student"}, "model_name_or_path: /no/student is neither a folder nor a name"),
        ({}, {"teacher_model_name_or_path": "./t"}, "teacher_model_name_or_path: ./t is neither a folder nor a name"),
    ],
)
def test_a_mistake_of_every_trial_is_found_before_the_first(tmp_path, base, files, changes, message):
    for split, content in files.items():
        file = tmp_path / "data" / f"{split}.jsonl"
        file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ValueError, match=f"^every trial: {message}"):
        check(tmp_path, base, **changes)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"path": "json", "data_files": "FOLDER/none.jsonl"}, "datasets: .*none.jsonl"),
        ({"path": "FOLDER", "split": "tset"}, 'Unknown split "tset"'),
        ({"path": "FOLDER"}, rf"{HERE} 'test' \(dataset_test_split\); there are train"),
    ],
)
def test_and_of_a_mixture(tmp_path, base, part, message):
    del base["dataset_name"]
    part = {key: value.replace("FOLDER", str(tmp_path / "data")) for key, value in part.items()}
    with pytest.raises(ValueError, match=f"^every trial: {message}"):
        check(tmp_path, base, datasets=[part])


def test_data_that_one_choice_alone_cannot_be_trained_on_is_of_that_choice(tmp_path, base):
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(TEXT)
    sweep, _ = read_sweep(written(tmp_path, {**CONTENT, "base": base, "space": {"lmbda": [0.0, 1.0]}}))
    with pytest.raises(ValueError, match=r"^space.lmbda=1.0: with lmbda > 0"):
        check_space(sweep)


def test_a_sweep_that_cannot_be_made_leaves_nothing(tmp_path, base, capsys):
    (tmp_path / "data" / "test.jsonl").unlink()
    file, out = written(tmp_path, {**CONTENT, "base": base}), tmp_path / "out"
    assert cli.main(["sweep", str(file), "--output-dir", str(out)]) == 2
    said = f"amid-trl sweep: every trial: {HERE} 'test' (dataset_test_split); there are train\n"
    assert capsys.readouterr().err == said and not out.exists()
