"""The interactive figure in a real browser: its numbers are the package's, and it can be used by keyboard."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from browser import opened

from amid_trl import DIVERGENCES, Objective, alpha_mixture


FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "explore.html"
ORDERS = ("pr", "rp", "qr", "rq", "pq", "qp")


@pytest.fixture(scope="module")
def page():
    with opened(FIGURE) as page:
        yield page


@pytest.fixture(scope="module")
def pairs(page) -> dict[str, list[list[float]]]:
    return page.evaluate("PAIRS")


def computed(page, settings: list[dict]) -> list[dict]:
    return page.evaluate("all => all.map(compute)", settings)


def close(got: list[float], want: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want.double(), rtol=tolerance, atol=tolerance)


def test_its_divergences_and_orders_are_the_packages(page):
    assert page.evaluate("Object.keys(DIVERGENCES)") == list(DIVERGENCES)
    assert page.evaluate("Object.keys(ORDERS)") == list(ORDERS)


def test_the_mixture_and_its_weights_are_the_packages(page, pairs):
    grid = product((-8.0, -5.0, -1.0, 0.5, 1.0, 1.1, 3.0, 8.0), (0.0, 0.1, 0.7, 1.0), (0.25, 1.0, 4.0), pairs)
    names = ("alpha", "lambda", "temperature", "pair")
    asked = [{**dict(zip(names, values, strict=True)), "divergence": "kl", "order": "pr"} for values in grid]
    for settings, found in zip(asked, computed(page, asked), strict=True):
        alpha, lam = settings["alpha"], settings["lambda"]
        logits = torch.tensor(pairs[settings["pair"]], dtype=torch.float64)
        log_p, log_q = (logits / settings["temperature"]).log_softmax(-1)
        close(found["p"], log_p.exp())
        close(found["q"], log_q.exp())
        close(found["r"], alpha_mixture(log_p, log_q, alpha=alpha, lam=lam).exp())
        if 0 < lam < 1:
            from_p, from_q = lam * log_p.exp() ** ((1 - alpha) / 2), (1 - lam) * log_q.exp() ** ((1 - alpha) / 2)
            close(found["w"], from_q / (from_p + from_q))
        else:
            assert found["w"] == [1 - lam] * len(log_p)


@pytest.mark.parametrize("order", ORDERS)
def test_values_and_gradients_are_the_packages(page, pairs, order):
    names = ("alpha", "temperature", "divergence", "pair")
    grid = product((-5.0, 0.5, 3.0), (2.0,), DIVERGENCES, pairs)
    asked = [{**dict(zip(names, values, strict=True)), "lambda": 0.3, "order": order} for values in grid]
    for settings, found in zip(asked, computed(page, asked), strict=True):
        how = {"alpha": settings["alpha"], "lam": 0.3, "temperature": settings["temperature"]}
        teacher, student = torch.tensor(pairs[settings["pair"]], dtype=torch.float64)
        student.requires_grad_()
        value = Objective(settings["divergence"], order, **how)(student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        close([found["value"]], value.detach()[None], 1e-8)
        close(found["gradient"], gradient, 2e-6)
        listed = {each["name"]: each for each in found["all"]}[settings["divergence"]]
        close([listed["value"], listed["norm"]], torch.stack([value.detach(), gradient.norm()]), 5e-6)


def test_it_shows_what_it_computes_and_obeys_the_keyboard(page):
    table = page.locator("#words tbody tr")
    before = table.all_inner_texts()
    assert page.locator("#said").inner_text().startswith("KL(p ‖ r) = ")
    page.locator("#alpha").focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert page.locator("#alpha-value").inner_text() == "-4.0"
    page.keyboard.press("Tab")
    page.keyboard.press("Home")  # λ = 0
    after = table.all_inner_texts()
    assert after != before
    for line in after:
        _, _, q, r, w, _ = line.split("\t")
        assert q == r and w == "1.000"
    page.keyboard.press("End")  # λ = 1: r is the teacher
    assert "the student learns nothing" in page.locator("#said").inner_text()
    for _ in range(2):  # past T
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "divergence"
    page.keyboard.press("ArrowDown")
    assert page.locator("#said").inner_text().startswith("Jensen-Shannon(p ‖ r)")


def test_every_control_and_picture_has_a_name(page):
    names = page.evaluate("[...document.querySelectorAll('input, select')].map(e => e.labels[0]?.innerText.trim())")
    assert len(names) == 6 and all(names)
    assert all(page.locator(f"#{name} > title").text_content() for name in ("bars", "arrows"))
    assert page.evaluate("document.documentElement.lang") == "en"


def contrast(first: str, second: str) -> float:
    """WCAG's ratio of two colours as a browser gives them, rgb(…)."""

    def luminance(colour: str) -> float:
        channels = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark_and_on_a_phone(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 800})
    colour = "e => getComputedStyle(document.querySelector(e)).%s"
    ground = page.evaluate(colour % "backgroundColor", "body")
    for element in ("body", ".p", ".q", ".r", ".g", "thead th"):
        assert contrast(page.evaluate(colour % "color", element), ground) >= 4.5, element
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
