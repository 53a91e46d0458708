"""Every command in the README, docs/ and the examples is one that the package, the Makefile or accelerate knows."""

import argparse
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_commands import COMMANDS, IN_SENTENCES, ROOT
from tiny import messages_dataset

from amid_trl import cli
from amid_trl.comparison.spec import read_comparison
from amid_trl.launch import launched, launcher, recipes, script
from amid_trl.parser import OneLineParser


OF_US = [name for name in (*cli.COMMANDS, *cli.LAUNCHED) if name != "compared-run"]


class Parsed(Exception):
    """A command would begin its work now."""


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_dir):
    """A folder with the files that the commands name; what a command starts is noted, not started."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        messages_dataset(4).to_json(tmp_path / "DATA" / f"{split}.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Is water wet?", "completion": "Yes."}\n')
    (tmp_path / "runs" / "study").mkdir(parents=True)
    study = [f"runs/study/{name}" for name in ("student", "SmolLM2-135M-Instruct")]
    for name in ("STUDENT", "TEACHER", "ADAPTER", "runs/first", *study):
        (tmp_path / name).symlink_to(tiny_dir)
    (tmp_path / "runs" / "study" / "data").symlink_to(tmp_path / "DATA")
    run = {"model_name_or_path": "STUDENT", "teacher_model_name_or_path": "TEACHER", "dataset_name": "DATA"}
    run |= {"output_dir": "runs/out", "use_cpu": True, "bf16": False, "lmbda": 0.0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    [zero2] = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), flags=re.DOTALL)
    (tmp_path / "zero2.json").write_text(zero2)
    (tmp_path / "runs" / "out" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "runs" / "out" / "checkpoint-1" / "trainer_state.json").write_text("{}")
    for name in ("amid_trl", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def begun(monkeypatch) -> list[list[str]]:
    """What accelerate would be told, one entry for each command that gets so far."""
    asked: list[list[str]] = []
    monkeypatch.setattr(
        launched, "_launched", lambda launch_args, module, script_args: asked.append([*launch_args, *script_args]) or 0
    )
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(OneLineParser, "parse_args", stop)
    return asked


def recipe(name: str) -> dict[str, Any]:
    """What a recipe of that name sets; nothing, if it is a file of the reader's."""
    return yaml.safe_load(Path(recipes.config_path(name)).read_text()) if name in recipes.names() else {}


def of_ours(argv: list[str], place: Path, begun: list[list[str]], monkeypatch) -> None:
    """Run a command of ours until it would begin to work."""
    if "…" in argv or "--config" not in argv or argv[argv.index("--config") + 1] != "run.yaml":
        argv = [text for text in argv if text != "…"]
        if argv[0] in cli.LAUNCHED:
            given = {"model_name_or_path": "STUDENT", "teacher_model_name_or_path": "TEACHER", "dataset_name": "DATA"}
            given |= {"output_dir": "runs/out", "use_cpu": "true", "bf16": "false"}
            named = recipe(argv[argv.index("--config") + 1]) if "--config" in argv else {}
            if any(field.startswith("teacher") for field in named):  # it names its teachers
                del given["teacher_model_name_or_path"]
            argv += [f"--{name}={value}" for name, value in given.items() if f"--{name}" not in argv]
    run = yaml.safe_load((place / "run.yaml").read_text())
    if "--teacher_model_server_url" in argv:
        run.pop("teacher_model_name_or_path")
    if argv[0] == "cache-teacher":
        run["teacher_cache"] = "cache"
    (place / "run.yaml").write_text(yaml.safe_dump(run))
    if "tensorboard" in argv and find_spec("tensorboard") is None:
        argv[argv.index("tensorboard")] = "none"  # it needs an extra
    if argv[0] in cli.LAUNCHED:
        assert cli.main(argv) == 0
        [given] = begun
        assert not launcher.unknown_to_launcher(given[: given.index("--config")] if "--config" in given else [])
        return
    if argv[0] == "landscape":  # its own parser leaves what is training's to training's
        monkeypatch.setattr(script, "parse", lambda *args, **kwargs: (_ for _ in ()).throw(Parsed))
        monkeypatch.setattr(OneLineParser, "parse_args", argparse.ArgumentParser.parse_args)
        if any(text.startswith("examples/") for text in argv):  # models and data that an example makes first
            argv += ["--model_name_or_path", "STUDENT", "--teacher_model_name_or_path", "TEACHER"]
            argv += ["--dataset_name", "DATA"]
    with pytest.raises(Parsed):
        cli.main(argv)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_docs_is_known(command, place, begun, monkeypatch, capsys):
    name, *argv = shlex.split(command)
    if name == "amid-trl":
        of_ours(argv, place, begun, monkeypatch)
    elif name in ("accelerate", "torchrun"):
        at = argv.index("-m")
        assert argv[at + 1] == "amid_trl"
        flags = argv[1:at] if name == "accelerate" else []
        assert not launcher.unknown_to_launcher(flags)
        assert all((place / path).exists() for path in flags if path.endswith(".yaml"))
        of_ours(argv[at + 2 :], place, begun, monkeypatch)
    elif name in ("python", "sbatch", "kubectl"):
        path = argv[{"python": 2 * (argv[0] == "-m"), "sbatch": 0, "kubectl": 2}[name]]
        assert (ROOT / path).is_file()
    elif name == "make":
        assert re.search(rf"^{argv[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    else:
        extras = [extra for text in argv for found in re.findall(r"\[(.*)\]", text) for extra in found.split(",")]
        known = re.findall(r'^ +"([\w-]+)": \[', (ROOT / "setup.py").read_text(), flags=re.MULTILINE)
        assert set(extras) <= set(known)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("command", [command for command in IN_SENTENCES if command not in COMMANDS])
def test_a_command_in_a_sentence_is_known(command, place, begun, monkeypatch, capsys):
    name, *argv = shlex.split(command)
    if name == "accelerate" and argv[0] in ("config", "launch"):
        argv = argv[1 + 2 * ("-m" in argv) :]
    elif name != "amid-trl":
        return test_a_command_of_the_docs_is_known(command, place, begun, monkeypatch, capsys)
    if argv:
        assert argv[0] in OF_US
    if argv[-1:] == ["--help"]:
        with pytest.raises((SystemExit, Parsed)):
            cli.main(argv)
    elif len(argv) > 1 and not argv[-1].startswith("--") and "…" not in argv[-1]:  # it is a whole one
        for path in [text for text in argv if text.startswith("runs/") and text.endswith(".yaml")]:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text((place / "run.yaml").read_text())
        of_ours(argv, place, begun, monkeypatch)


def test_every_command_of_ours_is_in_the_docs():
    shown = {command.split()[1] for command in COMMANDS if command.startswith("amid-trl")}
    assert shown == {*OF_US} - {"merge"}  # which is in a sentence
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("page", ["compare.md", "decide.md"])
def test_a_comparison_of_the_docs_can_be_read(page, place):
    text = (ROOT / "docs" / page).read_text()
    [content] = [block for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL) if "\nruns:" in block]
    (place / "comparison.yaml").write_text(content)
    assert len(read_comparison("comparison.yaml").runs) >= 3


def fields() -> set[str]:
    """All that `amid-trl train` takes."""
    parser = script.make_parser(prog="amid-trl train")
    return {option.lstrip("-") for option in parser._option_string_actions} | {"accelerate_config", "num_processes"}


@pytest.mark.parametrize("page", ["decide.md", "migrating.md", "quickstart.md", "troubleshooting.md"])
def test_every_field_that_a_page_sets_exists(page):
    text = (ROOT / "docs" / page).read_text()
    spans = re.findall(r"`([^`\n]+)`", text)
    ours = [span for span in spans if "there" not in span]
    flags = {flag for span in ours for flag in re.findall(r"--([a-z]\w*_\w+)", span)}
    keywords = {name for span in ours for name in re.findall(r"(?<![\w{\"])([a-z]\w+)=(?=[\w\"{\[.])", span)}
    unknown = (flags | keywords) - fields() - {"teacher_model", "deepspeed_config"}
    assert not unknown
