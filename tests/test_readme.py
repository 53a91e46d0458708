"""The README's Python runs; only names of models and data on the Hub are replaced by tiny ones."""

import re
from pathlib import Path

from tiny import messages_dataset


README = Path(__file__).parents[1] / "README.md"


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
