"""The site's hook: what pages link to outside docs/ comes into the site, under its path in the repository.

On GitHub a page links to `../benchmarks/results/linear_loss.md`; in the site that file is a page or a download of its
own, `benchmarks/results/linear_loss.md`, and the link is written anew. mkdocs.yml names this file.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


DOCS = Path(__file__).parent
ROOT = DOCS.parent
# A relative link or picture in Markdown, up to its anchor.
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def outside(page: Path) -> list[Path]:
    """The files that a page links to and that are not below docs/."""
    links = [(page.parent / link).resolve() for link in LINK.findall(page.read_text(encoding="utf-8"))]
    return [path for path in links if path.is_file() and not path.is_relative_to(DOCS)]


def place(path: Path) -> str:
    """Where a file stands in the site: below docs/ as there, else as in the repository."""
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is linked to, and what that links to in turn."""
    waiting = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    known = set(waiting)
    while waiting:
        for path in outside(waiting.pop()):
            if path in known or path == ROOT / "README.md":
                continue
            known.add(path)
            files.append(File.generated(config, place(path), abs_src_path=str(path)))
            if path.suffix == ".md":
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links from where the page stands in the site."""
    here = Path(str(page.file.abs_src_path))

    def rewritten(match: re.Match[str]) -> str:
        path = (here.parent / match[1]).resolve()
        if path == ROOT / "README.md":
            path = DOCS / "index.md"
        if not path.is_file():
            return match[0]
        return posixpath.relpath(place(path), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(rewritten, markdown)
