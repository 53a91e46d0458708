"""Accelerate's launcher is told of each engine by name, and nothing that the training arguments say."""

import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from tiny import messages_dataset, save_tiny, tiny_llama, tiny_tokenizer

from amid_trl import AMiDConfig, cli
from amid_trl.launch import accelerate_configs


ENGINES = {
    "single": "MULTI_GPU",
    "ddp": "MULTI_GPU",
    "zero1": "DEEPSPEED",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
    "fsdp2": "FSDP",
}
TRLS_OWN = ["fsdp1", "multi_gpu", "single_gpu"]
LAUNCHERS_VARIABLES = ("ACCELERATE_", "FSDP_", "LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS_VARIABLES)},
    "DS_ACCELERATOR": "cpu",
}
# On a CPU DeepSpeed builds its communication when it is first used.
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="needs the extra `deepspeed` and a C++ compiler",
)
ALL = [pytest.param(name, marks=needs_deepspeed if name.startswith("zero") else ()) for name in ENGINES]
# Weights that follow the gradient's size, which Adam would hide, and no clipping.
SETTINGS = [
    "--use_cpu", "--bf16=False", "--lmbda=0.0", "--report_to=none", "--save_strategy=no", "--num_train_epochs=1",
    "--train_sampling_strategy=sequential", "--optim=sgd", "--learning_rate=0.05", "--max_grad_norm=100.0",
    "--disable_tqdm=True",
]  # fmt: skip


# ---- What is in them ----


def test_there_is_one_for_each_engine_and_trls_where_there_is_none():
    files = accelerate_configs.files()
    assert sorted(files) == sorted([*ENGINES, *TRLS_OWN])
    ours = {name for name, path in files.items() if path.parent == accelerate_configs.FOLDER}
    assert ours == set(ENGINES)


@pytest.mark.parametrize("name", ENGINES)
def test_accelerate_reads_it_and_leaves_the_rest_to_the_arguments(name):
    config = load_config_from_file(accelerate_configs.config_path(name))
    assert config.distributed_type.value == ENGINES[name]
    assert config.num_processes == (1 if name == "single" else -1)  # -1: the file has none
    assert config.mixed_precision is None
    assert not {"gradient_accumulation_steps", "gradient_clipping"} & set(config.deepspeed_config)


# ---- What is launched ----


# What is asked for before anything is launched.
NEEDED = [
    *("--output_dir", "unused", "--use_cpu", "--dataset_name", "data"),
    *("--model_name_or_path", "student", "--teacher_model_name_or_path", "teacher"),
]


@pytest.fixture
def launched(monkeypatch):
    """What `amid-trl train` with these flags would start torchrun with: arguments, environment of the processes."""
    runs = []
    for name in set(os.environ) - set(ENVIRONMENT):
        monkeypatch.delenv(name)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("torch.distributed.run.run", lambda args: runs.append((args, dict(os.environ))))

    def launch(*flags):
        cli.main(["train", *NEEDED, "--main_process_port=0", *flags])
        return runs.pop()

    return launch


@pytest.fixture
def launched_environment(launched, monkeypatch):
    """The test runs in the environment of a process of that engine."""

    def enter(name):
        _, environment = launched("--accelerate_config", name)
        for variable, value in environment.items():
            if variable.startswith(LAUNCHERS_VARIABLES):
                monkeypatch.setenv(variable, value)

    return enter


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
@needs_deepspeed
def test_deepspeed_is_what_the_name_says(name, launched_environment):
    launched_environment(name)
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    plugin, stage = DeepSpeedPlugin(), int(name[-1])
    assert plugin.zero_stage == stage
    assert plugin.zero3_init_flag == plugin.zero3_save_16bit_model == (stage == 3)
    assert plugin.gradient_accumulation_steps == plugin.gradient_clipping == "auto"
    assert plugin.offload_optimizer_device == plugin.offload_param_device == "none"


def test_fsdp2_is_what_the_name_says(launched_environment):
    launched_environment("fsdp2")
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


@pytest.mark.parametrize(("bf16", "precision"), [(True, "bf16"), (False, "no")])
@pytest.mark.parametrize("name", ALL)
def test_the_training_arguments_decide_the_precision(name, bf16, precision, launched_environment):
    launched_environment(name)
    config = AMiDConfig("unused", use_cpu=True, bf16=bf16)
    assert config.mixed_precision == precision
    if name.startswith("zero"):
        assert config.deepspeed_plugin.deepspeed_config["bf16"]["enabled"] is bf16


@pytest.mark.parametrize(
    ("name", "flags", "devices", "processes"),
    [
        ("ddp", [], 4, "4"),
        ("ddp", [], 0, "1"),
        ("ddp", ["--num_processes", "2"], 4, "2"),
        ("single", [], 4, "1"),
        ("fsdp2", ["--num_machines=2", "--machine_rank=1", "--main_process_ip=first"], 4, "4"),
        ("multi_gpu", [], 4, "8"),
    ],
)
def test_there_is_a_process_for_every_device(name, flags, devices, processes, launched, monkeypatch):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: devices)
    args, _ = launched("--accelerate_config", name, *flags)
    assert args.nproc_per_node == processes


@needs_deepspeed
def test_each_of_two_machines_starts_its_own_processes(launched):
    machine = ["--num_machines=2", "--machine_rank=1", "--main_process_ip=first", "--main_process_port=29511"]
    args, _ = launched("--accelerate_config", "zero2", "--num_processes=16", *machine)
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("2", 1, "8")
    assert args.rdzv_endpoint == "first:29511"


# ---- That they are found ----


@pytest.mark.parametrize("flags", [["--accelerate_config", "zero2"], ["--accelerate_config=zero2"]])
def test_a_name_stands_for_the_packages_file(flags):
    path = str(Path(accelerate_configs.__file__).with_name("zero2.yaml"))
    assert accelerate_configs.resolve([*flags, "--num_machines=1"]) == ["--config_file", path, "--num_machines=1"]


def test_a_file_wins_over_a_name(tmp_path, monkeypatch, launched):
    monkeypatch.chdir(tmp_path)
    Path("ddp").write_text("distributed_type: MULTI_GPU\nnum_processes: 3\n")
    args, _ = launched("--accelerate_config", "ddp")
    assert args.nproc_per_node == "3"


def test_a_flag_wins_over_the_key_of_the_run(tmp_path, launched):
    (tmp_path / "run.yaml").write_text("accelerate_config: ddp\nnum_processes: 3\n")
    args, environment = launched("--config", str(tmp_path / "run.yaml"))
    assert args.nproc_per_node == "3" and "ACCELERATE_USE_FSDP" not in environment
    args, environment = launched("--config", str(tmp_path / "run.yaml"), "--accelerate_config=fsdp2")
    assert args.nproc_per_node == "3" and environment["ACCELERATE_USE_FSDP"] == "true"


def test_an_unknown_name_is_answered_with_the_known_ones(capsys):
    known = ", ".join(sorted([*ENGINES, *TRLS_OWN]))
    assert cli.main(["train", *NEEDED, "--accelerate_config", "zero4"]) == 2
    said = capsys.readouterr().err
    assert "--accelerate_config zero4: neither " in said and f"the names are {known}\n" in said


def test_a_name_that_is_missing_is_missed(capsys):
    assert cli.main(["train", *NEEDED, "--accelerate_config"]) == 2
    assert "--accelerate_config: a name or a file has to follow" in capsys.readouterr().err


# ---- That they train ----


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """A student, a teacher and eight rows."""
    folder, tokenizer = tmp_path_factory.mktemp("launched"), tiny_tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        save_tiny(folder / name, tiny_llama(tokenizer, seed=seed), tokenizer)
    messages_dataset(8).to_json(folder / "data" / "train.jsonl")
    models = ["--model_name_or_path", str(folder / "student"), "--teacher_model_name_or_path", str(folder / "teacher")]
    return [*models, "--dataset_name", str(folder / "data"), *SETTINGS]


LAUNCHER = [str(Path(sys.executable).with_name("amid-trl")), "train"]


def start(command: list[str], output_dir: Path, *flags: str) -> subprocess.Popen:
    command = [*command, "--output_dir", str(output_dir), *flags]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def student_of(output_dir: Path, *processes: subprocess.Popen) -> dict[str, torch.Tensor]:
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-4000:]
        assert "is deprecated" not in errors, "as DeepSpeed's calls are, many times a step"
    return load_file(output_dir / "model.safetensors")


@pytest.fixture(scope="module")
def trained_alone(arguments, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The student after two steps of four rows at once, in a process that no launcher has started."""
    folder = tmp_path_factory.mktemp("alone")
    alone = start([sys.executable, "-m", "amid_trl", "train"], folder, *arguments, "--per_device_train_batch_size=4")
    trained, before = student_of(folder, alone), load_file(Path(arguments[1]) / "model.safetensors")
    assert all(not torch.equal(trained[name], weight) for name, weight in before.items())
    return trained


ACCUMULATED_BY_TWO = ["--per_device_train_batch_size=1", "--gradient_accumulation_steps=2", "--num_processes=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("single", ["--per_device_train_batch_size=4"]),
        ("ddp", ACCUMULATED_BY_TWO),
        *(pytest.param(name, ACCUMULATED_BY_TWO, marks=needs_deepspeed) for name in ("zero1", "zero2", "zero3")),
    ],
)
def test_a_launched_run_saves_the_student_of_one_process(name, split, arguments, trained_alone, tmp_path):
    flags = [*arguments, "--accelerate_config", name, "--main_process_port=0", *split]
    launched = student_of(tmp_path, start(LAUNCHER, tmp_path, *flags))
    torch.testing.assert_close(launched, trained_alone, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", pytest.param("zero2", marks=needs_deepspeed)])
def test_two_launchers_that_meet_save_the_student_of_one_process(name, arguments, trained_alone, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = ["--num_machines=2", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    flags = [*arguments, "--accelerate_config", name, *meeting, *ACCUMULATED_BY_TWO]
    launchers = [start(LAUNCHER, tmp_path, *flags, f"--machine_rank={rank}") for rank in (0, 1)]
    torch.testing.assert_close(student_of(tmp_path, *launchers), trained_alone, rtol=1e-5, atol=1e-6)
