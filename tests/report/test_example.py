"""The page that lies under examples/ is that of the results beside it."""

import re
from pathlib import Path

from amid_trl import cli
from amid_trl.report import page


ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "report"


def without_pictures(html: str) -> str:
    """Their bytes depend on matplotlib's version."""
    return re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)


def test_the_command_of_the_example_writes_the_page(tmp_path, monkeypatch):
    [command] = re.findall(
        r"^    amid-trl (report (?:.*\\\n)*.*)$", (EXAMPLE / "README.md").read_text(), flags=re.MULTILINE
    )
    arguments = command.replace("\\\n", " ").split()
    stored = ROOT / arguments[arguments.index("--output") + 1]
    arguments[arguments.index("--output") + 1] = str(tmp_path / "report.html")
    monkeypatch.setattr(page, "picture", lambda figure, kind: b'<svg viewBox="0 0 1 1"></svg>')
    monkeypatch.chdir(ROOT)
    assert cli.main(arguments) == 0
    assert without_pictures((tmp_path / "report.html").read_text()) == without_pictures(stored.read_text())
    assert stored.stat().st_size < 1_000_000
