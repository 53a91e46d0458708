"""SECURITY.md is true of the code: no pickle, no remote code, no network and no open port unless asked for."""

import ast
import dataclasses
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch

import amid_trl
from amid_trl import AMiDConfig, AMiDTrainer, cli


PACKAGE = Path(amid_trl.__file__).parent
UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Those that speak to a server which the user has named, or are that server.
NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "uvicorn", "starlette"}
SPEAK = {"teacher"}


@cache
def trees() -> list[tuple[Path, ast.Module]]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    return [(file.relative_to(PACKAGE), ast.parse(file.read_text())) for file in files]


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(package, name) of what a file imports, wherever in it; the name is empty for a module as a whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (((node.module or "").split(".")[0], alias.name) for alias in node.names)


def calls(tree: ast.Module, name: str) -> Iterator[ast.Call]:
    """Calls of a function or method, by the last part of its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called == name:
                yield node


def given(call: ast.Call, name: str) -> object:
    """The constant that a call passes for a keyword; None where it passes none."""
    return next((ast.literal_eval(each.value) for each in call.keywords if each.arg == name), None)


def test_nothing_is_unpickled():
    found = [(str(file), *each) for file, tree in trees() for each in imports(tree) if each[0] in UNPICKLING]
    assert found == [("training/checkpoints.py", "pickle", "UnpicklingError")]  # what torch says of a bad file
    loads = [call for file, tree in trees() for call in calls(tree, "load") if ast.unparse(call.func) == "torch.load"]
    assert len(loads) >= 2 and all(given(call, "weights_only") is True for call in loads)
    assert not [file for file, tree in trees() for call in calls(tree, "load") if given(call, "allow_pickle")]


def test_no_yaml_makes_objects():
    loads = [ast.unparse(call.func) for _, tree in trees() for call in calls(tree, "load")]
    assert "yaml.load" not in loads


def test_remote_code_is_never_run_by_default():
    assert AMiDConfig("out", use_cpu=True, bf16=False).trust_remote_code is False
    fixed = [
        (str(file), ast.unparse(node))
        for file, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) == "True"
    ]
    defaults = [
        (str(file), ast.unparse(default))
        for file, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.arguments)
        for argument, default in zip(
            [*node.posonlyargs, *node.args, *node.kwonlyargs][::-1],
            [*node.kw_defaults[::-1], *node.defaults[::-1]],
            strict=False,
        )
        if argument.arg == "trust_remote_code" and default is not None and ast.unparse(default) != "False"
    ]
    assert not fixed and not defaults


@pytest.mark.parametrize("command", ["evaluate", "init-student", "serve-teacher", "merge"])
def test_a_command_runs_remote_code_only_if_its_flag_is_given(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--trust-remote-code" in text or "trust" not in text


def test_only_teachers_speak_to_servers():
    speaking = {file.parts[0] for file, tree in trees() for name, _ in imports(tree) if name in NETWORK}
    assert speaking <= SPEAK


def test_a_training_opens_no_connection(monkeypatch, tmp_path, student, teacher, tokenizer):
    """Where the Hub may be asked, and nobody has told TRL not to report."""
    from huggingface_hub import constants
    from tiny import messages_dataset

    asked = []

    def refuse(self, address):
        asked.append(address)
        raise OSError("no network in this test")

    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    reported = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **kwargs: reported.append(args))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: refuse(None, args[0]))
    settings = {"use_cpu": True, "bf16": False, "max_steps": 1, "max_new_tokens": 4, "disable_tqdm": True}
    args = AMiDConfig(str(tmp_path / "run"), **settings)
    AMiDTrainer(student, teacher, args, train_dataset=messages_dataset(8), processing_class=tokenizer).train()
    assert not asked and not reported
    assert args.report_to in ([], "none", ["none"]) and not args.push_to_hub


def test_a_served_teacher_listens_to_this_machine_alone(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve-teacher", "--help"])
    assert "default: 127.0.0.1" in " ".join(capsys.readouterr().out.split())


def test_a_state_with_an_object_in_it_is_refused(tmp_path, train):
    taid = {
        "objective": "taid",
        "save_strategy": "steps",
        "save_steps": 1,
        "assistant_lambda_schedule": {"kind": "taid"},
    }
    trainer = train(max_steps=1, **taid)
    trainer.train()
    [state] = (tmp_path / "run" / "checkpoint-1").glob("distillation_state_0.pt")
    torch.save({**torch.load(state, weights_only=True), "more": Path("x")}, state)
    with pytest.raises(UnpicklingError, match=r"weights_only|Unsupported"):
        train(max_steps=2, **taid).train(resume_from_checkpoint=True)


def test_no_field_holds_a_secret_that_a_card_or_log_would_show():
    """Tokens are read by huggingface_hub from where it keeps them; the fields that hold one are transformers' own."""
    secret = [field.name for field in dataclasses.fields(AMiDConfig) if "token" in field.name.split("_")]
    of_text = {"eos_token", "pad_token", "token_selection", "token_selection_share", "token_selection_count"}
    assert set(secret) == {"hub_token"} | of_text
