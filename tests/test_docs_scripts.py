"""Every `python SCRIPT …` of docs, examples, recorded results and the Makefile is one that SCRIPT takes."""

import argparse
import re
import runpy
import shlex
import sys

import pytest
from docs_commands import PAGES, ROOT


# The changelog's may be of yesterday.
FILES = [page for page in PAGES if page.name != "changelog.md"]
FILES += [ROOT / "Makefile", *(ROOT / "benchmarks" / "results").glob("*.md")]
for pattern in ("benchmarks/*.py", "docs/*.py", "examples/**/*.py", "examples/**/*.yaml"):
    FILES += ROOT.glob(pattern)
SCRIPT = re.compile(r"\bpython3? +((?:-m +pytest +)?[\w./-]+\.py\b[^`\n]*)|`(pytest [^`\n]+\.py[^`\n]*)")


def script_commands() -> set[str]:
    """The scripts with what they are given; the shell's marks, comments and what may be left out are cut off."""
    found = set()
    for file in FILES:
        for script, tests in SCRIPT.findall(file.read_text().replace("\\\n", " ")):
            command = (script or tests).split('"""')[0]
            found.add(re.split(r"\s+(?:#|&&|>|\[|$)|[.:,;]?$", " ".join(command.split()))[0])
    return found


COMMANDS = sorted(script_commands())


class Parsed(Exception):
    """A script would begin its work now."""


@pytest.fixture
def stops_when_parsed(monkeypatch):
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self, *args, **kwargs):
        assert parse(self, *args, **kwargs)[1] == []
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)


def test_there_are_commands_with_flags():
    with_flags = [command for command in COMMANDS if " --" in command]
    assert len(COMMANDS) > 30 and len(with_flags) > 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_script_takes_what_it_is_given(command, stops_when_parsed, monkeypatch):
    name, *argv = shlex.split(command)
    if name in ("-m", "pytest"):
        assert all((ROOT / text).is_file() for text in argv if text.endswith(".py"))
        return
    script = ROOT / name
    assert script.is_file()
    if "Parser(" not in script.read_text():
        assert not [text for text in argv if text.startswith("-")]
        return
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [name, *argv])
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")
