"""A page in a headless Chromium that the machine has; a test that asks for one is skipped where there is none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest


NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Watched(NamedTuple):
    """Playwright's page of a file, the addresses that it has asked for, and what it has said on its console."""

    page: Any
    requests: list[str]
    said: list[str]
    file: Path


@contextmanager
def watched(file: Path, **settings: Any) -> Iterator[Watched]:
    """The page of a file, in a window of these settings, those of `new_page`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a Chromium on the path ({', '.join(NAMES)}): apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page, requests, said = browser.new_page(**settings), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.resolve().as_uri())
        yield Watched(page, requests, said, file)
        browser.close()


@contextmanager
def opened(file: Path, **settings: Any) -> Iterator[Any]:
    """Playwright's page of a file, which may say nothing on its console and load nothing but files."""
    with watched(file, **settings) as seen:
        yield seen.page
    assert not seen.said and all(url.startswith("file:") for url in seen.requests)
