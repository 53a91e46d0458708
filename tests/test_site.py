"""`make docs`: the site is built without a warning, its links lead somewhere, and it asks nobody else for anything."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

import amid_trl


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder


class Links(HTMLParser):
    """What a page loads, what it links to, and what can be linked to in it."""

    def __init__(self, page: Path):
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors.add(given.get("id") or "")
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])
        elif tag == "link" and given.get("rel") != "canonical":
            self.loaded.append(given["href"])
        elif tag == "a" and given.get("href"):
            self.linked.append(given["href"])


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Links]:
    return {page: Links(page) for page in site.rglob("*.html") if page.name not in ("404.html", "explore.html")}


def test_every_page_of_docs_is_in_the_navigation_and_built(site):
    text = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text())

    def leaves(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [leaf for each in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(each)]

    named = leaves(yaml.safe_load(text)["nav"])
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    assert all((site / name).with_suffix(".html").is_file() for name in named)


def test_no_list_or_table_is_read_as_a_paragraph(site):
    """Where GitHub would still see one: the site wants a line between, and four spaces below a list's entry."""
    lost = {
        page.name: found
        for page in site.glob("*.html")
        if (found := re.findall(r"<p>[^<]*\n *(?:- |\|).{0,40}", page.read_text()))
    }
    inline = {
        page.name for page in site.glob("*.html") if re.search(r"<p>(?:(?!</p>).)*\n- ", page.read_text(), re.DOTALL)
    }
    assert not lost and not inline


def test_nothing_is_loaded_from_elsewhere(pages):
    loaded = {source for page in pages.values() for source in page.loaded}
    assert len(pages) > 20 and not [source for source in loaded if re.match(r"(https?:)?//", source)]


def test_links_lead_to_pages_files_and_headings_of_the_site(pages):
    broken = []
    for page, links in pages.items():
        for link in {*links.linked, *links.loaded}:
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / unquote(path)).resolve() if path else page
            if not target.exists() or (target in pages and unquote(anchor) not in pages[target].anchors):
                broken.append(f"{page.name}: {link}")
    assert not broken


def test_what_pages_link_to_beside_docs_is_in_the_site(site):
    assert (site / "benchmarks" / "results" / "linear_loss.html").is_file()
    assert (site / "examples" / "quickstart.ipynb").is_file()
    assert (site / "examples" / "study" / "README.html").is_file() or (
        site / "examples" / "study" / "index.html"
    ).is_file()


def test_every_public_name_is_explained(pages):
    [api] = [links for page, links in pages.items() if page.name == "api.html"]
    homes = {name: f"amid_trl.{home}" for name, home in amid_trl._HOMES.items()}
    explained = [name for name in ("AMiDTrainer", "Objective", "alpha_mixture", "linear_distillation_loss")]
    assert all(f"{homes[name]}.{name}" in api.anchors for name in explained)
    assert {f"amid_trl.maths.published.{name}" for name in amid_trl.OBJECTIVES if name != "amid"} & api.anchors
    functions = {divergence.__name__ for divergence in amid_trl.DIVERGENCES.values()}
    assert {f"amid_trl.maths.divergences.{name}" for name in functions} <= api.anchors


def test_the_api_page_and_the_promised_names_agree():
    page = (ROOT / "docs" / "api.md").read_text()
    assert all(re.search(rf"\b{name}\b", page) for name in amid_trl.__all__)
