"""The command line without torch: what it reads of other packages is what they are, and mistakes are found by it."""

import argparse
import base64
import json
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
from mistakes import COMPARE, GIVEN, MISTAKES, NO_TEACHER, TORCH_MISTAKES
from peft import get_peft_model
from tiny import tiny_llama

from amid_trl import DIVERGENCES, OBJECTIVES, AMiDConfig, cli
from amid_trl._trl import launch_command_parser
from amid_trl.launch import declared, flags, script
from amid_trl.maths.names import DIVERGENCE_NAMES, OBJECTIVE_NAMES, SELECTION_NAMES
from amid_trl.maths.selection import SELECTIONS
from amid_trl.training.inherited import HONOURED, REFUSED
from amid_trl.training.objective_fields import check_objective


ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers.training_args", "peft", "bitsandbytes", "trl.trainer.sft_config")
ENVIRONMENT = {
    **{
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "LOCAL_RANK", "COLUMNS"))
    },
    "CUDA_VISIBLE_DEVICES": "",  # no GPU
}
FOLDERS = ["training", "teacher", "data", "sources", "training"]
# In their files in a form that is not read; nothing is refused because of them.
UNREAD = {
    "log_level": ("choices",),
    "log_level_replica": ("choices",),
    "parallelism_config": ("type",),
    "optim": ("default",),
}
HELP = [
    *(["--help"], ["train", "--help"], ["train", "-h"], ["train", "--help-all"], ["cache-teacher", "--help"]),
    *(
        ["evaluate", "--help"],
        ["compare", "--help"],
        ["sweep", "--help"],
        ["landscape", "--help"],
        ["report", "--help"],
        ["init-student", "--help"],
        ["merge", "--help"],
    ),
    ["serve-teacher", "--help"],
    ["env", "--help"],
]
# Packages that a machine may have, without which these are mistakes.
ABSENT = ("vllm", "liger_kernel", "trackio", "lm_eval")
SECONDS = 5.0  # of the processor: less than half of what importing TRL's trainers takes on a machine without a load


def described(parser: argparse.ArgumentParser) -> dict:
    """What an option accepts, by its spelling."""
    options = {}
    for action in parser._actions:
        for option in action.option_strings:
            kind = getattr(action.type, "__name__", None)
            options[option] = {
                "dest": action.dest,
                "nargs": action.nargs,
                "const": action.const,
                "type": kind,
                "choices": None if action.choices is None else [*map(str, action.choices)],
                "default": str(action.default),
            }
    return options


@pytest.fixture(scope="module")
def parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    return flags.declared_parser(), script.make_parser()


def test_the_options_are_those_of_the_installed_versions(parsers):
    light, real = map(described, parsers)
    assert set(light) == set(real)
    for option, theirs in real.items():
        for key, value in theirs.items():
            if key not in UNREAD.get(theirs["dest"], ()):
                assert light[option][key] == value, f"{option}: {key}"


def test_the_help_of_inherited_fields_says_what_is_done_here(parsers):
    for parser in parsers:
        texts = {action.dest: " ".join((action.help or "").split()) for action in parser._actions}
        assert texts["max_length"].startswith("Maximum length of the tokenized sequence. Here: bounds prompt and ")
        assert "from the left or right" not in texts["max_length"]
        assert texts["beta"].endswith(
            'Here: of `objective="gkd"` alone, where it means the same; any other objective warns that it is not read.'
        )
        assert "the same as the model being trained" not in texts["teacher_model_name_or_path"]
        for name, text in HONOURED.items():
            assert texts[name].endswith(f"Here: {text}."), name
        for name, (_, why) in REFUSED.items():
            assert texts[name].endswith(f": {why}."), name
        assert texts["learning_rate"] and "Here" not in texts["learning_rate"]
        assert "Here:" not in texts["max_new_tokens"] + texts["vllm_structured_outputs_regex"]
        parser.format_help()


def test_the_launchers_options_are_those_of_the_installed_version():
    light, real = described(flags.launcher_parser()), described(launch_command_parser())
    assert set(light) == set(real) - {"-h", "--help"}
    for option, ours in light.items():
        assert (ours["dest"], ours["nargs"]) == (real[option]["dest"], real[option]["nargs"]), option
        assert ours["type"] in (real[option]["type"], None), option  # None: in a form that is not read
        assert ours["choices"] in (real[option]["choices"], None), option


def test_the_names_are_those_of_the_maths():
    assert tuple(OBJECTIVES) == OBJECTIVE_NAMES
    assert tuple(SELECTIONS) == SELECTION_NAMES
    assert tuple(DIVERGENCES) == DIVERGENCE_NAMES


def test_the_parameters_are_those_of_the_maths():
    read = flags.parameter_names()
    for name, objective in OBJECTIVES.items():
        assert read["objective"][name] == read["student_text_objective"][name] == [*signature(objective).parameters]
    for name, divergence in DIVERGENCES.items():
        assert read["divergence"][name] == [*signature(divergence).parameters][2:]


def answered(
    *arguments: str, code: str = "sys.exit(main(sys.argv[1:]))"
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """What a command says, and what it has imported of what takes seconds."""
    code = (
        "import atexit, json, sys\n"
        f"atexit.register(lambda: print(json.dumps([m for m in {HEAVY} if m in sys.modules]), file=sys.stderr))\n"
        f"from amid_trl.cli import main\n{code}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    *said, imported = done.stderr.splitlines()
    return subprocess.CompletedProcess(arguments, done.returncode, done.stdout, "\n".join(said)), json.loads(imported)


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_is_quick(arguments):
    done, imported = answered(*arguments)
    assert done.returncode == 0 and not done.stderr and done.stdout.startswith("usage: amid-trl")
    assert not imported


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """What stands for a file or a folder in MISTAKES."""
    folder = tmp_path_factory.mktemp("places")
    right = COMPARE.replace("eval_nl", "eval_nll").replace("mixd", "mixed")
    contents = {
        "BAD": "a: [1\n",
        "KEY": "model_name_or_path: s\ndataset_name: d\nlmda: 0.5\n",
        "TYPE": "model_name_or_path: s\ndataset_name: d\nlearning_rate: fast\n",
        "SET": '{"prompt": "What?"}\n',
        "METRIC": COMPARE,
        "RUN": right.replace("mixed", "mixd"),
        "NAMELESS": right.replace("teacher_model_name_or_path: teacher, ", ""),
        "BATCH": right.replace("sampling: mixed", "per_device_train_batch_size: 0"),
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return {"FOLDER": str(folder), "MODEL": str(model), **{name: str(folder / name) for name in contents}}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(each[0])[-60:] for each in MISTAKES])
def test_a_mistake_is_one_line(arguments, message, places, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for package in ABSENT:
        monkeypatch.setitem(sys.modules, package, None)
    assert cli.main([places.get(text, text) for text in arguments]) == 2
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith(f"amid-trl {arguments[0]}: ") and message in line and not printed.out


def test_mistakes_are_found_before_what_takes_seconds_is_imported(places):
    every = [[places.get(text, text) for text in arguments] for arguments, _ in MISTAKES]
    code = f"sys.modules.update(dict.fromkeys({ABSENT}))\n[main(json.loads(each)) for each in sys.argv[1:]]"
    done, imported = answered(*map(json.dumps, every), code=code)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == len(MISTAKES)
    assert not imported


def test_a_command_that_there_is_not_is_named():
    for arguments in ([], ["trian"]):
        done, imported = answered(*arguments)
        [line] = done.stderr.splitlines()
        assert (done.returncode, imported) == (2, [])
        assert line.startswith("amid-trl: ") and line.endswith("(amid-trl --help lists the commands)")


def test_what_the_real_parser_accepts_is_not_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: s\nteacher_model_name_or_path: t\ndataset_name: d\nlearning_rate: 1e-5\n"
        "num_processes: 2\nenv: {AMID_X: 1}\n"
    )
    loaders = tmp_path / "loaders.json"
    loaders.write_text('{"even_batches": false}')
    encoded = base64.urlsafe_b64encode(b'{"zero_optimization": {"stage": 2}}').decode()
    (tmp_path / "checkpoint-1").mkdir()
    for given in (
        ["--config", str(file), "--accelerate_config", "ddp"],
        [*GIVEN, "--num-processes", "2", "--mixed_precision=bf16"],
        [*GIVEN, "--loss_type", "chunked_nll"],  # which TRL turns into what we accept
        [*GIVEN, "--log_level", "info", "--optim", "adafactor", "--lr_scheduler_type", "cosine"],
        [*GIVEN, "--lmbda_schedule", '{"kind": "linear", "start": "0.1", "end": 1}'],
        [*GIVEN, "--report_to", "none", "--no_disable_dropout", "--top_p", "0.9", "--min-p", "none"],
        [*GIVEN, "--num_generations", "4", "--gradient_accumulation_steps", "2", "--lmbda=1"],
        [*GIVEN, "--packing"],
        [*GIVEN, "--padding_free", "--lmbda", "1"],
        [*GIVEN, "--deepspeed", encoded, "--dataset_kwargs", '{"skip_prepare_dataset": true}'],
        [*GIVEN, "--accelerator_config", str(loaders), "--fsdp_config", "unread.json", "--warmup_steps", "0.1"],
        [*GIVEN, "--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "0.1", "--save_steps", "0.2"],
        [*GIVEN, "--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "best"],
        [*GIVEN, "--resume_from_checkpoint", str(tmp_path), "--report_to", "azure_ml", "--torch_compile", "False"],
        [*GIVEN, "--resume_from_checkpoint", "auto", "--output_dir", str(tmp_path)],
        [*GIVEN, "--resume_from_checkpoint", "true", "--output_dir", str(tmp_path), "--pretrain_dataset", "a/b"],
        [*NO_TEACHER, "--teacher_adapter_path", "base", "--chat_template_path", "owner/model"],
        [*NO_TEACHER, "--teacher_cache", str(tmp_path), "--lmbda", "0"],
        [*NO_TEACHER, "--teacher_model_server_url", "http://localhost:8000/v1"],
    ):
        if (config := flags.check_flags(given, "train")) is not None:
            check_objective(config)


@pytest.mark.parametrize(("arguments", "message"), TORCH_MISTAKES, ids=["range", "type", "student's", "machine"])
def test_these_mistakes_are_found_with_torch_alone(arguments, message):
    before = os.times()
    done, imported = answered("train", *GIVEN, *arguments)
    after = os.times()
    [line] = done.stderr.splitlines()
    assert done.returncode == 2 and message in line
    assert imported == ["torch"]
    assert after.children_user + after.children_system - before.children_user - before.children_system < SECONDS


def test_only_what_trl_turns_into_what_we_accept_is_in_doubt():
    assigned = getattr(flags.declared_config(), "_assigned") & REFUSED.keys()  # noqa: B009 (no type declares it)
    # Switched on alone; set by a method that nobody calls; turned into another value that is refused.
    assert assigned == {*flags.TURNED, "torch_compile", "auto_find_batch_size", "packing_strategy"}
    for name, values in flags.TURNED.items():
        for value in values:
            with pytest.warns(FutureWarning):
                config = AMiDConfig("x", use_cpu=True, bf16=False, report_to="none", **{name: value})
            assert getattr(config, name) in REFUSED[name][0]


def test_help_begins_with_our_own_fields(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    short = capsys.readouterr().out
    headings = [line for line in short.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert [heading.rpartition("/")[2].rstrip("):") for heading in headings[:5]] == FOLDERS
    assert headings[5].startswith("inherited") and len(headings) == 6
    assert "--adam_beta1" not in short and "--lmbda FLOAT" in short
    assert short.splitlines()[-1].endswith("more inherited fields: amid-trl train --help-all")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help-all"])
    everything = capsys.readouterr().out
    spelt = {action.option_strings[0] for action in flags.declared_parser()._actions}
    assert {
        option
        for option in spelt
        if f"{option} " in everything or f"{option}\n" in everything or f"{option}," in everything
    } >= {option for option in spelt if not option.startswith(("--no_", "-h", "--help"))}


def test_where_the_files_are_not_as_we_know_them_the_real_parser_decides(monkeypatch, capsys):
    monkeypatch.setattr(flags, "declared_config", lambda: 1 / 0)
    assert flags.check_flags(["--learning_rate", "fast"], "train") is None


def test_what_is_not_read_refuses_nothing():
    assert "anything" in declared.Unread() and declared.Unread.keys.values is declared.Unread
    assert isinstance(declared.Unread("text"), declared.Unread)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(["q_proj"], {"q_proj"}), (["q_proj", "v_proj"], {"q_proj", "v_proj"}), (["all-linear"], "all-linear")],
)
def test_one_module_for_an_adapter_is_one_module(given, wanted, tokenizer):
    flags = ["--model_name_or_path", "s", "--teacher_model_name_or_path", "t", "--dataset_name", "d", "--use_cpu"]
    flags += ["--bf16", "False", "--output_dir", "unused", "--use_peft", "--lora_target_modules", *given]
    *_, model_args, _ = script.parse(flags)
    config = script.peft_config_of(model_args)
    assert config.target_modules == wanted
    get_peft_model(tiny_llama(tokenizer), config)
