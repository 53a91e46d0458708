"""The README's Python runs on tiny models in place of the Hub's; the map of the code has every folder, and no file."""

import re
import runpy
from pathlib import Path

import torch
from tiny import messages_dataset

import amid_trl
from amid_trl import AMiDTrainer


ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def in_place_of_the_hub(script: str, tiny_dir: Path, folder: Path) -> str:
    """The script with tiny models, few rows and steps, on the CPU."""
    messages_dataset(8).to_json(folder / "data" / "train.jsonl")
    settings = "use_cpu=True, report_to='none', max_steps=2"
    for theirs, ours in {
        r'"Qwen/Qwen2.5-[\d.]+B-Instruct"': repr(str(tiny_dir)),
        r'"trl-lib/[\w-]+"': repr(str(folder / "data")),
        r'AMiDConfig\(\s*"[\w/-]+"': f"AMiDConfig({str(folder / 'run')!r}, {settings}",
    }.items():
        script, count = re.subn(theirs, lambda _, text=ours: text, script)
        assert count, theirs
    return script


def test_the_first_script_runs(tmp_path, tiny_dir):
    [script] = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(script.splitlines()) == 10
    names: dict = {}
    exec(compile(in_place_of_the_hub(script, tiny_dir, tmp_path), "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 2


def test_the_minimal_example_is_short_and_runs(tmp_path, tiny_dir):
    example = ROOT / "examples" / "minimal.py"
    script = example.read_text()
    assert len(script.splitlines()) <= 30
    for theirs, ours in {
        "max_steps=200,\n": "",
        "test_size=100": "test_size=2",
        "eval_steps=50": "eval_steps=1",
    }.items():
        assert theirs in script
        script = script.replace(theirs, ours)
    names: dict = {}
    exec(compile(in_place_of_the_hub(script, tiny_dir, tmp_path), str(example), "exec"), names)
    assert names["trainer"].state.global_step == 2
    assert [log["step"] for log in names["trainer"].state.log_history if "eval_loss" in log] == [1, 2]
    assert names["answer"][0]["generated_text"][-1]["role"] == "assistant"


def test_the_script_in_trls_style_keeps_what_is_given_for_loading(tmp_path, tiny_dir, monkeypatch):
    messages_dataset(8).to_json(tmp_path / "data" / "train.jsonl")
    made, flags = [], {"model_name_or_path": tiny_dir, "teacher_model_name_or_path": tiny_dir, "report_to": "none"}
    flags |= {"dataset_name": tmp_path / "data", "output_dir": tmp_path / "run", "max_steps": 1, "use_cpu": True}
    flags |= {"teacher_model_init_kwargs": '{"dtype": "bfloat16", "attn_implementation": "eager"}'}
    flags |= {"attn_implementation": "sdpa", "save_strategy": "no", "lmbda": 0.0}
    monkeypatch.setattr("sys.argv", ["amid.py", *(f"--{name}={value}" for name, value in flags.items())])
    monkeypatch.setattr(amid_trl, "AMiDTrainer", lambda **given: made.append(AMiDTrainer(**given)) or made[0])
    runpy.run_path(str(ROOT / "examples" / "scripts" / "amid.py"), run_name="__main__")
    assert (made[0].teacher_model.dtype, made[0].model.dtype) == (torch.bfloat16, torch.float32)
    assert made[0].teacher_model.config._attn_implementation == "eager"
    assert made[0].state.global_step == 1 and (tmp_path / "run" / "model.safetensors").exists()


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
