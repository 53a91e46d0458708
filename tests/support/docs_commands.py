"""The commands that the README, docs/ and the examples show."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", *sorted((ROOT / "examples").glob("*/README.md"))]
KNOWN = ("amid-trl", "accelerate", "torchrun", "python", "make", "pip", "sbatch", "kubectl")


def commands(page: Path) -> list[str]:
    """The lines of code that begin with a command's name, those that a backslash ends joined with the next."""
    text = page.read_text().replace("\\\n", " ")
    lines = [
        re.sub(r"\s+# .*", "", line).strip() for line in re.findall(r"^(?: {4,})(\S.*)$", text, flags=re.MULTILINE)
    ]
    return [" ".join(line.split()) for line in lines if line.split()[0] in KNOWN]


def in_sentences(page: Path) -> list[str]:
    """What prose sets as code and begins with a command's name; a name alone is none."""
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", page.read_text())]
    return [span for span in spans if len(span.split()) > 1 and span.split()[0] in KNOWN]


COMMANDS = sorted({command for page in PAGES for command in commands(page)})
# Those of the examples' own pages are hours of work on a real model, whose results are beside them.
OF_EXAMPLES = {command for page in PAGES if "examples" in page.parts for command in commands(page)}
# The changelog's may be of yesterday.
IN_SENTENCES = sorted({span for page in PAGES if page.name != "changelog.md" for span in in_sentences(page)})
