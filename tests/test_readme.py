"""The README's Python runs on tiny models in place of the Hub's; the map of the code has every folder, and no file."""

import re
from pathlib import Path

from tiny import messages_dataset


ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_first_script_runs(tmp_path, tiny_dir):
    [script] = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    messages_dataset(8).to_json(tmp_path / "data" / "train.jsonl")
    settings = "use_cpu=True, max_steps=2, report_to='none'"
    for theirs, ours in {
        r'"Qwen/Qwen2.5-[\d.]+B-Instruct"': repr(str(tiny_dir)),
        r'"trl-lib/[\w-]+"': repr(str(tmp_path / "data")),
        r'AMiDConfig\("qwen-amid"': f"AMiDConfig({str(tmp_path / 'run')!r}, {settings}",
    }.items():
        script, count = re.subn(theirs, lambda _, text=ours: text, script)
        assert count, theirs
    names: dict = {}
    exec(compile(script, "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 2


def folders(package: Path) -> set[str]:
    """The folders below a package that hold files of it."""
    files = [file for file in package.rglob("*") if file.suffix in (".py", ".yaml")]
    return {f"{file.parent.relative_to(package)}/" for file in files} - {"./"}


def mapped(page: str) -> tuple[set[str], set[str]]:
    """(folders, files) of the package that the map names, by their paths below it."""
    text = page.partition("## Map\n")[2].partition("\n## ")[0]
    above, found = {0: ""}, set()
    for spaces, name in re.findall(r"^    ( *)(\S+/)  ", text, flags=re.MULTILINE):
        path = above[len(spaces)] + name
        above[len(spaces) + 2] = path
        found.add(path)
    folders = {path.removeprefix("amid_trl/") for path in found if path.startswith("amid_trl/")} - {""}
    return folders, set(re.findall(r"\S+\.(?:py|yaml)\b", text))


def test_the_map_has_every_folder_and_no_file():
    named, files = mapped((ROOT / "docs" / "contributing.md").read_text())
    assert named == folders(ROOT / "amid_trl")
    assert not files


def test_a_folder_that_the_map_lacks_is_found(tmp_path):
    for path in ("maths/kl.py", "teacher/server/http.py"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    named, files = mapped("## Map\n\n    amid_trl/  all\n      maths/  kl.py\n\n## Next\n\n    other/  no\n")
    assert folders(tmp_path) - named == {"teacher/server/"}
    assert files == {"kl.py"}
