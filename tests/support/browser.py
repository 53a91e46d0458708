"""A page in a headless Chromium that the machine has; a test that asks for one is skipped where there is none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def opened(file: Path, **settings: Any) -> Iterator[Any]:
    """Playwright's page of a file; it must say nothing on its console. Settings are those of `new_page`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a Chromium on the path ({', '.join(NAMES)}): apt-get install chromium")
    said: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(**settings)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith("file:") else said.append(request.url))
        page.goto(file.resolve().as_uri())
        yield page
        browser.close()
    assert not said
