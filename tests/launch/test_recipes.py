"""The recipes are the published methods, say where each value comes from, train, and are found by their names."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from observe import Windows, logged, weights
from tiny import messages_dataset

from amid_trl import AMiDConfig, AMiDTrainer, Objective, cli
from amid_trl.fields import build_schedule
from amid_trl.launch import recipes
from amid_trl.launch import script as train
from amid_trl.maths.schedules import TaidLambda
from amid_trl.training.objective_fields import build_objective, build_student_text_objective


ROOT = Path(__file__).parents[2]
AB = {"alpha": 0.2, "beta": 0.7}
# What each method minimises, term by term: divergence, order, α and the teacher's share λ of r.
OBJECTIVES = {
    "gkd": Objective("js", "pq", divergence_kwargs={"beta": 0.1}),
    "distillm-skl": Objective("kl", "pr", alpha=-1.0, lam=0.1),
    "distillm-srkl": Objective("kl", "qr", alpha=-1.0, lam=0.9),
    "distillm-2": Objective("kl", "pr", alpha=-1.0, lam=0.1),
    "taid": Objective("kl", "rq", alpha=1.0, lam=0.4, detach_assistant=True),
    "abkd": Objective("ab", "pq", divergence_kwargs=AB),
    "amid": Objective("ab", "pr", alpha=-5.0, lam=0.1, divergence_kwargs=AB),
}
# Sampling, the least and the largest share of the student's text, and who may write the first steps.
TEXT = {
    "gkd": ("mixed", (0.5, 0.5), {"student", "dataset"}),
    "distillm-skl": ("adaptive", (0.0, 1.0), {"dataset"}),
    "distillm-srkl": ("adaptive", (0.0, 1.0), {"dataset"}),
    "distillm-2": ("mixed", (0.5, 0.5), {"student", "teacher"}),
    "taid": ("mixed", (0.0, 0.0), {"dataset"}),
    "abkd": ("mixed", (0.0, 0.0), {"dataset"}),
    "amid": ("adaptive", (0.0, 1.0), {"dataset"}),
}
ORIGINS = ("read in the code: ", "read in a copy: ", "stated in the paper: ", "ours: ")
HERE = ["--use_cpu", "--bf16", "False", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True"]
SHORT = ["--max_steps", "3", "--max_length", "64", "--max_new_tokens", "4", "--per_device_train_batch_size", "2"]


def parsed(name: str, *flags: str) -> AMiDConfig:
    arguments = recipes.resolve(["--config", name, "--output_dir", "unused", *HERE, *flags])
    return train.make_parser().parse_args_and_config(arguments)[1]


def text_of(name: str) -> str:
    return Path(recipes.config_path(name)).read_text()


# ---- What is in them ----


def test_there_is_one_for_each_method():
    assert set(OBJECTIVES) <= set(recipes.names())  # and those that name their models: test_pairs.py
    table = (ROOT / "docs" / "recipes.md").read_text()
    assert all(f"\n| `{name}` |" in table for name in OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_recipe_is_the_published_objective(name):
    config = parsed(name)
    assert build_objective(config) == OBJECTIVES[name]
    assert config.sft_weight == 0
    if name != "taid":
        assert not build_schedule(config, "assistant_lambda").moves
    if name != "distillm-2":
        assert build_student_text_objective(config) is None


def test_distillm_2_has_the_reverse_kl_without_the_mixtures_gradient_on_the_students_text():
    assert build_student_text_objective(parsed("distillm-2")) == Objective(
        "kl", "qr", alpha=-1.0, lam=0.9, detach_assistant=True
    )


def test_taid_moves_its_t_as_published():
    moving = build_schedule(parsed("taid"), "assistant_lambda")
    assert isinstance(moving, TaidLambda)
    assert (moving.start, moving.end, moving.rate, moving.momentum) == (0.4, 1.0, 5e-4, 0.99)


@pytest.mark.parametrize("name", TEXT)
def test_a_recipe_takes_its_text_from_where_the_method_does(name):
    config = parsed(name)
    assert (config.sampling, config.student_shares) == TEXT[name][:2]
    assert config.seq_kd == ("teacher" in TEXT[name][2])
    if name != "distillm-2":
        assert (config.temperature, config.top_p, config.top_k) == (1.0, 1.0, 0) or not config.generates


@pytest.mark.parametrize("name", recipes.names())
def test_every_value_says_where_it_comes_from(name):
    above = ""
    for line in text_of(name).splitlines():
        setting, _, comment = (part.strip() for part in line.partition("#"))
        if setting:
            assert (comment or above).startswith(ORIGINS), line
        above = f"{above} {comment}".lstrip() if comment and not setting else ""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_recipe_sets_the_method_alone(name):
    settings = yaml.safe_load(text_of(name))
    assert set(settings) <= {field.name for field in dataclasses.fields(AMiDConfig)}
    assert not {"output_dir", "teacher_model_name_or_path", "pretrain_dataset"} & set(settings)


@pytest.mark.parametrize("name", recipes.names())
def test_numbers_are_not_read_as_text(name):
    settings = yaml.safe_load(text_of(name))
    mappings = [value for value in settings.values() if isinstance(value, dict)]
    for value in [*settings.values(), *(value for mapping in mappings for value in mapping.values())]:
        if isinstance(value, str):
            with pytest.raises(ValueError):  # YAML takes 1e-7, without a point, for a word
                float(value)


# ---- That they train ----


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_recipe_trains(name, student, teacher, tokenizer, tmp_path):
    before = weights(student)
    config = parsed(name, *SHORT, "--output_dir", str(tmp_path), "--logging_steps", "1")
    trainer = AMiDTrainer(
        student,
        teacher,
        config,
        train_dataset=messages_dataset(8),
        eval_dataset=messages_dataset(2) if config.eval_strategy != "no" else None,
        processing_class=tokenizer,
    )
    seen = Windows(trainer)
    trainer.train()
    assert set(seen.sources) <= TEXT[name][2]
    losses = logged(trainer, "loss")
    assert len(losses) == 3 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert all(not torch.equal(weight, before[key]) for key, weight in weights(trainer.model).items())
    if name == "taid":
        t = logged(trainer, "assistant_lambda")
        assert t[0] == 0.4 < t[-1] and t == sorted(t)


@pytest.mark.parametrize("lmbda", ["1.0", "0.0"])
def test_the_recipe_for_two_domains_trains_with_two_teachers(lmbda, student, tokenizer, models, tmp_path):
    settings = yaml.safe_load(text_of("domains"))["teachers"]
    assert {name: set(fields) for name, fields in settings.items()} == {
        name: {"teacher_model_name_or_path"} for name in ("math", "code")
    }
    teachers = {"math": models["teacher"], "code": models["student"]}
    given = json.dumps({name: {"teacher_model_name_or_path": place} for name, place in teachers.items()})
    flags = ("--teachers", given, "--lmbda", lmbda, "--output_dir", str(tmp_path), "--logging_steps", "1")
    rows = messages_dataset(8).add_column("teacher", ["math", "code"] * 4)
    config = parsed("domains", *SHORT, *flags)
    trainer = AMiDTrainer(student, None, config, train_dataset=rows, processing_class=tokenizer)
    before = weights(student)
    trainer.train()
    assert all(objective == Objective("kl", "qp") for objective in trainer._parts.objectives.current.values())
    assert all(logged(trainer, f"kl/{name}") for name in teachers)
    assert all(not torch.equal(weight, before[key]) for key, weight in weights(trainer.model).items())


# ---- That they are found ----


@pytest.mark.parametrize("arguments", [["--config", "taid"], ["--config=taid"]])
def test_a_name_stands_for_the_packages_file(arguments):
    path = str(Path(recipes.__file__).with_name("taid.yaml"))
    assert recipes.resolve(["--lmbda", "0.5", *arguments, "--beta=1"]) == [
        *("--lmbda", "0.5", "--config", path, "--beta=1")
    ]
    assert recipes.resolve(["--objective", "taid"]) == ["--objective", "taid"]


def test_a_file_wins_over_a_recipe_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("taid").write_text("lmbda: 0.0")
    Path("gkd").mkdir()
    assert recipes.resolve(["--config", "taid"]) == ["--config", "taid"]
    assert recipes.resolve(["--config=gkd"])[1].endswith("gkd.yaml")


def test_an_unknown_name_is_answered_with_the_recipes(capsys):
    assert cli.main(["train", "--config", "tiad", "--output_dir", "unused"]) == 2
    assert "--config tiad: neither a file nor a recipe; the recipes are abkd, amid, " in capsys.readouterr().err


def test_flags_win_over_the_recipe():
    config = parsed("gkd", "--beta", "0.7", "--learning_rate", "1e-3", "--lr_scheduler_kwargs", '{"min_lr": 0.5}')
    assert build_objective(config) == Objective("js", "pq", divergence_kwargs={"beta": 0.7})
    assert (config.learning_rate, config.lr_scheduler_kwargs) == (1e-3, {"min_lr": 0.5})
    assert (config.lmbda, config.max_new_tokens) == (0.5, 256)


def test_the_command_hands_the_recipe_to_its_processes(monkeypatch):
    launched = []
    monkeypatch.setattr("amid_trl.launch.launcher.accelerate_launch", lambda *args: launched.append(args))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    flags = ["--model_name_or_path", "student", "--teacher_model_name_or_path", "teacher", "--dataset_name", "data"]
    flags += ["--output_dir", "unused", "--use_cpu"]
    assert cli.main(["train", "--config", "taid", *flags, "--num_processes", "4"]) == 0
    [(launcher, _, script)] = launched
    assert launcher == ["--num_processes", "4"]
    assert script == ["--config", recipes.config_path("taid"), *flags]


def test_a_process_under_a_launcher_takes_the_name_itself(monkeypatch):
    runs = []
    monkeypatch.setattr(train, "main", lambda *parsed: runs.append(parsed))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert cli.main(["train", "--config", "taid", "--output_dir", "unused", "--use_cpu"]) == 0
    assert runs[0][1].objective == "taid"


def test_the_help_names_the_recipes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert ", ".join(recipes.names()) in " ".join(capsys.readouterr().out.split())
