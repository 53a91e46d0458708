"""The command line, run as a user runs it: real processes, the tiny model on disk."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ENVIRONMENT, SETTINGS
from observe import unwanted
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import messages_dataset, save_tiny, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DatasetMixtureConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig

from amid_trl import cli
from amid_trl.launch import accelerate_configs
from amid_trl.launch import script as train


ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "amid-trl train": [str(Path(sys.executable).with_name("amid-trl")), "train"],
    "accelerate launch -m amid_trl": [
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "-m", "amid_trl", "train"),  # or accelerate names them
    ],
    "python examples/scripts/amid.py": [sys.executable, str(ROOT / "examples" / "scripts" / "amid.py")],
}


def run(*command: str) -> str:
    """What it prints; it has to succeed."""
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    messages_dataset(8).to_json(folder / "train.jsonl")
    return folder


@pytest.fixture(scope="module")
def student_of(tmp_path_factory, tiny_dir, data_dir):
    """The adapter that a launcher trains and saves, and what it prints; the script is given a YAML file."""
    tokenizer, models = tiny_tokenizer(), tmp_path_factory.mktemp("models")
    teacher = save_tiny(models / "teacher", tiny_llama(tokenizer, seed=3), tokenizer)
    flags = [f"--model_name_or_path={tiny_dir}", f"--teacher_model_name_or_path={teacher}", *SETTINGS]
    flags += [f"--dataset_name={data_dir}", "--use_peft", "--lora_r=4", "--lora_target_modules", "q_proj", "v_proj"]
    file = models / "run.yaml"
    file.write_text(
        f"model_name_or_path: {tiny_dir}\nteacher_model_name_or_path: {teacher}\ndataset_name: {data_dir}\n"
        f"output_dir: {models / 'from-yaml'}\nuse_cpu: true\nbf16: false\nmax_steps: 2\nmax_new_tokens: 4\n"
        "lmbda: 1.0\nreport_to: none\nper_device_train_batch_size: 2\nsave_strategy: 'no'\nassistant_alpha: -3.0\n"
        "use_peft: true\nlora_r: 4\nlora_target_modules: [q_proj, v_proj]\n"
    )

    @cache
    def launch(launcher: str) -> tuple[dict[str, torch.Tensor], str]:
        folder = tmp_path_factory.mktemp("run")
        given = ["--config", str(file)] if launcher.endswith(".py") else flags
        said = run(*LAUNCHERS[launcher], *given, "--output_dir", str(folder))
        assert not (models / "from-yaml").exists()
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
        logs = json.loads((folder / "trainer_state.json").read_text())[
            "log_history"
        ]  # which save_strategy leaves to us
        assert logs[-1]["step"] == 2
        return load_file(folder / "adapter_model.safetensors"), said

    return launch


@pytest.mark.sampled(2)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_way_to_launch_trains_the_same_student(student_of, launcher):
    student, _ = student_of(launcher)
    assert all(weight.any() for weight in student.values())  # an adapter begins with zeros
    torch.testing.assert_close(student, student_of("amid-trl train")[0], rtol=0, atol=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_training_is_quiet(student_of, launcher):
    _, said = student_of(launcher)
    assert "train_runtime" in said and not unwanted(said)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objektive", "kd"], "unknown arguments: --objektive"),
        (["--divergence", "foo"], "divergence must be one of kl, "),
        (["--accelerate_config", "nosuch"], "neither a file nor a configuration"),
        (["--config", "nosuch"], "nosuch"),
    ],
)
def test_a_mistake_is_one_line(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert cli.main(["train", "--output_dir", str(tmp_path), "--use_cpu", "--bf16=False", *flags]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("amid-trl train: ") and message in line


@pytest.mark.slow
def test_what_is_found_before_training_is_one_line(tmp_path, tiny_dir, data_dir):
    command = [LAUNCHERS["amid-trl train"][0], "train", "--cpu", "--model_name_or_path", str(tiny_dir), *SETTINGS]
    command += ["--dataset_name", str(data_dir), "--output_dir", str(tmp_path), "--dataset_train_split", "trian"]
    command += ["--teacher_model_name_or_path", str(tiny_dir)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "amid-trl train: the dataset has no split 'trian' (dataset_train_split); there are train"
    )
    assert "Traceback" not in done.stderr


def test_an_unknown_flag_is_refused_by_name(tmp_path, tiny_dir, data_dir):
    command = [sys.executable, "-m", "amid_trl", "train", "--model_name_or_path", str(tiny_dir), *SETTINGS]
    done = subprocess.run([*command, "--assistant_alfa=1"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "unknown arguments: --assistant_alfa=1" in done.stderr


def test_a_yaml_file_may_hold_the_launchers_keys_but_no_others(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nnum_processes: 2\naccelerate_config: ddp\n")
    runs = []
    monkeypatch.setattr(train, "main", lambda *parsed: runs.append(parsed))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    train.run(["--config", str(file)])
    assert len(runs) == 1 and runs[0][1].output_dir == str(tmp_path)
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nlmda: 0.5\nnum_processes: 2\n")
    with pytest.raises(ValueError, match=r"unknown arguments: --lmda \(did you mean --lmbda\?\)$"):
        train.run(["--config", str(misspelt)])
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="unknown arguments: --num_processes 2 --accelerate_config ddp"):
        train.run(["--config", str(file)])


def test_the_teacher_keeps_its_dtype_whatever_the_students_is(tmp_path, tiny_dir, data_dir, monkeypatch):
    seen = {}

    class Trainer:
        def __init__(self, args, **kwargs):
            seen.update(student=args.model_init_kwargs["dtype"], teacher=args.teacher_model_init_kwargs)
            raise KeyboardInterrupt

    monkeypatch.setattr("amid_trl.training.trainer.AMiDTrainer", Trainer)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    arguments = ["--model_name_or_path", str(tiny_dir), "--teacher_model_name_or_path", str(tiny_dir), "--use_cpu"]
    with pytest.raises(KeyboardInterrupt):
        train.run([*arguments, "--dataset_name", str(data_dir), "--output_dir", str(tmp_path), "--dtype", "float32"])
    assert seen["student"] == "float32" and "dtype" not in seen["teacher"]
    old = [
        "--model_init_kwargs",
        '{"torch_dtype": "bfloat16"}',
        "--teacher_model_init_kwargs",
        '{"torch_dtype": "float16"}',
    ]
    with pytest.raises(KeyboardInterrupt):
        train.run([*arguments, "--dataset_name", str(data_dir), "--output_dir", str(tmp_path), *old])
    assert seen["student"] == "bfloat16" and seen["teacher"]["dtype"] == "float16"


def test_mistakes_are_one_line_behind_a_launcher_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert cli.main(["train", "--output_dir", str(tmp_path), "--use_cpu", "--lmda", "0.5"]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "amid-trl train: unknown arguments: --lmda 0.5 (did you mean --lmbda?)"
    )


def test_data_that_is_not_there_is_named(tmp_path):
    arguments = ScriptArguments(dataset_name=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"dataset_name '.*none' is neither a folder with data nor found on the Hub"):
        train.load_splits(arguments, DatasetMixtureConfig())


@pytest.mark.parametrize(
    ("command", "function", "said"),
    [
        ("evaluate", "evaluation.command.evaluate_model", "stopped; the same command goes on"),
        ("merge", "models.command.merge", "stopped"),
    ],
)
def test_ctrl_c_is_one_line(monkeypatch, capsys, command, function, said):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"amid_trl.{function}", interrupted)
    assert cli.main([command, "model", *(["--output-dir", "out"] if command == "evaluate" else ["out"])]) == 130
    assert capsys.readouterr().err == f"\namid-trl {command}: {said}\n"


@pytest.mark.parametrize("arguments", [["init-student", "DIR", "DIR", "--drop-layers", "1"], ["merge", "x", "DIR"]])
def test_a_model_is_not_overwritten(tiny_dir, capsys, arguments):
    before = {file: file.stat() for file in tiny_dir.iterdir()}
    assert cli.main([str(tiny_dir) if text == "DIR" else text for text in arguments]) == 2
    assert f"{tiny_dir} holds a model already" in capsys.readouterr().err
    assert {file: file.stat() for file in tiny_dir.iterdir()} == before


def test_a_split_that_is_not_there_is_named(tmp_path, tiny_dir, monkeypatch):
    messages_dataset(4).to_json(tmp_path / "train.jsonl")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    arguments = ["--model_name_or_path", str(tiny_dir), "--teacher_model_name_or_path", str(tiny_dir), "--use_cpu"]
    arguments += ["--dataset_name", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--eval_strategy", "epoch"]
    with pytest.raises(ValueError, match=r"no split 'test' \(dataset_test_split\); there are train"):
        train.run(arguments)


def test_a_split_of_a_mixture_is_the_same_in_every_process(tmp_path):
    """TRL draws it with numpy's random state, which is another one in each process."""
    messages_dataset(8).to_json(tmp_path / "train.jsonl")
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(str(tmp_path))], test_split_size=4)
    np.random.seed(3)
    first = train.load_splits(ScriptArguments(), mixture)
    after = np.random.random()
    np.random.seed(4)
    assert train.load_splits(ScriptArguments(), mixture)["test"][:] == first["test"][:]
    np.random.seed(3)
    assert np.random.random() == after  # as if nothing had been drawn


def test_launch_arguments_go_to_accelerate_and_the_rest_to_the_script(monkeypatch):
    launched = []
    monkeypatch.setattr("amid_trl.launch.launcher.accelerate_launch", lambda *args: launched.append(args))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    given = ["--model_name_or_path", "student", "--teacher_model_name_or_path", "teacher", "--dataset_name", "data"]
    given += ["--output_dir", "out", "--use_cpu"]
    assert cli.main(["train", *given, "--accelerate_config", "zero2", "--num_processes", "4"]) == 0
    launch, module, script = launched[0]
    assert launch == ["--config_file", accelerate_configs.config_path("zero2"), "--num_processes", "4"]
    assert module == "amid_trl.launch.script"
    assert script == given


@pytest.mark.parametrize("command", [[], ["train"], ["init-student"], ["merge"]])
def test_help_is_printed(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: amid-trl" in printed
    if command == ["train"]:
        assert "--assistant_alpha" in printed and "--model_name_or_path" in printed


def test_init_student_keeps_the_layers_that_are_not_dropped(tmp_path, tiny_dir, capsys):
    assert cli.main(["init-student", str(tiny_dir), str(tmp_path / "student"), "--drop-layers", "1"]) == 0
    assert "1 of 2 layers" in capsys.readouterr().out
    teacher = AutoModelForCausalLM.from_pretrained(tiny_dir)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 1
    kept = dict(student.named_parameters())
    assert all(torch.equal(kept[name], p) for name, p in teacher.named_parameters() if name in kept)
    assert AutoTokenizer.from_pretrained(tmp_path / "student").eos_token == "<|im_end|>"


@pytest.mark.parametrize(("layers", "message"), [("7", "the layers are 0 to 1"), ("x", "'x'"), ("0-1", "must stay")])
def test_layers_that_cannot_be_dropped_are_named(tmp_path, tiny_dir, capsys, layers, message):
    assert cli.main(["init-student", str(tiny_dir), str(tmp_path / "student"), "--drop-layers", layers]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


def test_merge_gives_the_logits_of_base_and_adapter(tmp_path, tiny_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.full_like(parameter, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(tmp_path / "adapter")
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_merged_student_ends_where_its_template_ends_a_turn(tmp_path):
    """The base ends texts alone, as base models do."""
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    base = tiny_llama(tokenizer)
    base.generation_config.eos_token_id = tokenizer.eos_token_id
    loaded = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "base", base, tokenizer))
    adapted = get_peft_model(loaded, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.eos_token_id == [tokenizer.eos_token_id, end]


def test_data_is_given_once(tmp_path, tiny_dir, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ValueError, match="give the data either as dataset_name or as a datasets mixture"):
        train.run(["--model_name_or_path", str(tiny_dir), "--output_dir", str(tmp_path), "--use_cpu"])
