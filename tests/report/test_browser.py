"""The page in a real browser: it asks for nothing, complains of nothing, and has the numbers of the JSON."""

import json

import pytest
from browser import watched

from amid_trl import cli
from amid_trl.choosing.report import HEADINGS
from amid_trl.choosing.suggestion import setting_of
from amid_trl.comparison.report import WORK
from amid_trl.plotting.heat_map import PANELS, short_number
from amid_trl.plotting.theme import DARK, LIGHT


axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the package axe-playwright-python")

HARMLESS = "\0<script>document.title = 'changed'</script><b>bold</b>"


def shown(text: str) -> str:
    """As a page can show it."""
    return "".join("\ufffd" if (ord(c) < 32 and c not in "\t\n\r") or ord(c) == 127 else c for c in text)


@pytest.fixture(scope="module")
def evaluations(evaluated, evaluated_teacher, tmp_path_factory) -> dict[str, dict]:
    """Those of teacher and student, one of whose answers is a piece of HTML."""
    teacher = json.loads((evaluated_teacher / "results.json").read_text())
    student = json.loads(json.dumps(evaluated[0]))
    student["completions"][0]["text"] = HARMLESS
    return {"teacher": teacher, "student": student}


@pytest.fixture(scope="module")
def opened(tmp_path_factory, run_folder, evaluations, comparison_folder, landscape_folder, sweep_folder):
    """One page of everything, written by the command."""
    folder = tmp_path_factory.mktemp("page")
    paths = [str(run_folder)]
    for name, content in evaluations.items():
        (folder / name).mkdir()
        (folder / name / "results.json").write_text(json.dumps(content))
        paths.append(f"{name}={folder / name}")
    file = folder / "all.html"
    paths += [str(comparison_folder), str(landscape_folder), str(sweep_folder)]
    assert cli.main(["report", *paths, "--prompts", "3", "--output", str(file)]) == 0
    with watched(file, viewport={"width": 1200, "height": 900}) as seen:
        yield seen


TABLES = """() => Object.fromEntries([...document.querySelectorAll("table")].map(table => [
    table.caption.textContent,
    [...table.tBodies[0].rows].map(row => [row.cells[0].textContent, [...row.cells].slice(1).map(cell => {
        const data = cell.querySelector("data")
        return data ? Number(data.value) : cell.textContent
    })])
]))"""


@pytest.fixture(scope="module")
def tables(opened) -> dict[str, dict[str, list]]:
    """Caption -> heading of a row -> its cells; a number in full."""
    found = opened.page.evaluate(TABLES)
    assert all(len(dict(rows)) == len(rows) for rows in found.values())
    return {caption: dict(rows) for caption, rows in found.items()}


def test_it_loads_nothing_and_says_nothing(opened):
    for scheme in ("light", "dark"):
        opened.page.emulate_media(color_scheme=scheme)
    assert opened.requests == [opened.file.as_uri()]
    assert opened.said == []
    assert opened.file.stat().st_size < 1_000_000


def test_what_a_model_wrote_is_text(opened):
    assert opened.page.get_by_text(shown(HARMLESS), exact=True).is_visible()
    assert "changed" not in opened.page.title() and opened.page.locator("script, b").count() == 0


def test_teacher_and_student_are_side_by_side(opened, evaluations):
    heading = opened.page.get_by_role("heading", name="Answers side by side")
    articles = heading.locator("xpath=following-sibling::article")
    rows = evaluations["teacher"]["rows"]
    assert articles.count() == 3
    for i in range(3):
        article = articles.nth(i)
        answers = {
            name: next(c["text"] for c in of["completions"] if c["row"] == i) for name, of in evaluations.items()
        }
        assert article.locator("h4").text_content().strip() == rows[i]["prompt"].strip()
        assert article.locator("dt").all_text_contents() == ["reference", *answers]
        texts = [rows[i]["references"][0], *answers.values()]
        assert article.locator("dd").all_text_contents() == [*map(shown, texts)]
    boxes = [articles.nth(0).locator("dd").nth(k).bounding_box() for k in range(3)]
    assert len({box["y"] for box in boxes}) == 1 and len({box["x"] for box in boxes}) == 3


def test_what_was_written_while_training_is_shown(opened, run_folder):
    from pyarrow import parquet

    first, *_, last = sorted(run_folder.glob("completions/*.parquet"))
    heading = opened.page.get_by_role("heading", name="Written while training")
    articles = heading.locator("xpath=following-sibling::article")
    rows = [row for file in (first, last) for row in parquet.read_table(file).to_pylist()]
    assert articles.locator("dd").all_text_contents() == [shown(row["completion"]) for row in rows]
    assert articles.nth(0).locator("dt").text_content() == f"step {rows[0]['step']}, text of the student"


def test_figures_of_the_runs_are_those_of_the_logs(tables, run_folder):
    history = json.loads((run_folder / "trainer_state.json").read_text())["log_history"]
    logs = tables["Logs of run"]
    assert list(logs) == ["1", "2", "3", "4"]
    by_step = {
        step: {k: v for entry in history if str(entry["step"]) == step for k, v in entry.items()} for step in logs
    }
    for column, name in enumerate(("loss", "eval_loss", "kl", "eval_kl")):
        assert [cells[column] for cells in logs.values()] == [by_step[step].get(name, "") for step in logs], name
    last = tables["The last figure of each kind in the logs"]
    assert last["kl"] == [history[-3]["kl"]] and last["eval_kl"] == [history[-2]["eval_kl"]]


def test_figures_of_the_evaluations_are_those_of_the_results(tables, evaluations):
    metrics = {name.partition(":")[0]: cells for name, cells in tables["Means over rows and sampling seeds"].items()}
    assert metrics == {name: [of["metrics"][name] for of in evaluations.values()] for name in metrics}
    assert {"rougeL", "kl_pq", "nll"} <= metrics.keys() == evaluations["teacher"]["metrics"].keys()


def test_figures_of_the_comparison_are_those_of_its_json(tables, comparison_folder):
    found = json.loads((comparison_folder / "comparison.json").read_text())
    runs, before = found["runs"], found["before_training"]
    means = tables["Mean ± sample standard deviation over training seeds"]
    for name, run in runs.items():
        assert means[name] == [3, run["metrics"]["eval_kl"]["mean"], *(run["work"][unit] for unit in WORK)]
    assert means["before training"] == [1, before["metrics"]["eval_kl"], 0, 0, 0]
    [differences] = [rows for caption, rows in tables.items() if caption.startswith("Against kd")]
    compared = {"before training": before, "low": runs["low"], "high": runs["high"]}
    assert differences == {name: [each["differences"]["eval_kl"]["mean"]] for name, each in compared.items()}


def test_figures_of_the_landscape_are_those_of_its_json(opened, tables, landscape_folder):
    measured = json.loads((landscape_folder / "landscape.json").read_text())
    [table] = [rows for caption, rows in tables.items() if caption.startswith("14 settings")]
    points = {"KL(p‖q)": measured["forward_kl"], "KL(q‖p)": measured["reverse_kl"]}
    points |= {str(setting_of(point)): point for point in measured["points"]}
    shown = {name: [point[column] for column in HEADINGS.values()] for name, point in points.items()}
    assert {name: [cell or None for cell in cells] for name, cells in table.items()} == {
        name: [number or None for number in numbers] for name, numbers in shown.items()
    }
    drawn = opened.page.get_by_role("img", name="Heat maps").locator("text").all_text_contents()
    of_assistant = [point for point in measured["points"] if point["alpha"] is not None]
    for column in set(PANELS) - {"relative_norm"}:
        for number in (point[column] for point in of_assistant if point[column] is not None):
            assert short_number(number) in drawn
    assert opened.page.get_by_text(measured["suggestion"]["reason"]).is_visible()


def test_figures_of_the_sweep_are_those_of_its_json(opened, tables, sweep_folder):
    found = json.loads((sweep_folder / "sweep.json").read_text())
    trials = {str(trial["number"]): trial for trial in found["trials"]}
    states = {number: trial["state"] for number, trial in trials.items()}
    states["7"] = "fail: <b>it is too warm</b>"
    assert tables["10 trials"] == {
        number: [
            *(states[number], "" if trial["value"] is None else trial["value"], *trial["params"].values()),
            *(trial["intermediate"]["5"], trial["seconds"]),
        ]
        for number, trial in trials.items()
    }
    [shares] = [rows for caption, rows in tables.items() if caption.startswith("Share of what eval_kl varies by")]
    assert shares == {axis: [share] for axis, share in found["importances"].items()}
    section = opened.page.get_by_role("region", name="Sweep search")
    assert section.get_by_text("8 complete, 1 pruned, 1 fail").is_visible()
    for name, value in found["best"]["settings"].items():
        assert f"{name}: {value}" in section.locator("pre").text_content()


# ---- For everybody ----


@pytest.mark.parametrize(("scheme", "palette"), [("light", LIGHT), ("dark", DARK)])
def test_page_and_pictures_have_the_colours_of_the_readers_screen(opened, scheme, palette):
    def rgb(colour: str) -> str:
        return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"

    opened.page.emulate_media(color_scheme=scheme)
    style = opened.page.evaluate(
        "() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color] }"
    )
    assert style == [rgb(palette.paper), rgb(palette.ink)]
    fills = "() => [...document.querySelectorAll('svg *')].map(getComputedStyle).flatMap(s => [s.fill, s.stroke])"
    used = set(opened.page.evaluate(fills))
    assert {rgb(palette.paper), rgb(palette.ink), *map(rgb, palette.colours[:2])} <= used
    other = DARK if palette is LIGHT else LIGHT
    assert not {rgb(other.paper), rgb(other.ink), *map(rgb, other.colours)} & used


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_mend(opened, scheme):
    opened.page.emulate_media(color_scheme=scheme)
    opened.page.evaluate("() => document.querySelectorAll('details').forEach(each => { each.open = true })")
    found = axe.Axe().run(opened.page).response
    assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
    assert {"color-contrast", "heading-order", "region", "scrollable-region-focusable"} <= {
        p["id"] for p in found["passes"]
    }


def test_a_screen_reader_finds_parts_pictures_and_tables(opened):
    page = opened.page
    titles = ["Training", "Comparison study", "Landscape grid", "Sweep search"]
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1
    for title in titles:
        assert page.get_by_role("region", name=title, exact=True).count() == 1
        assert page.get_by_role("heading", name=title, exact=True, level=2).count() == 1
    pictures = page.get_by_role("img")
    assert pictures.count() == 5  # two of curves
    names = [pictures.nth(i).get_attribute("aria-label") for i in range(5)]
    assert all(len(name) > 30 for name in names)
    page.evaluate("() => document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert page.get_by_role("table", name="Against kd").get_by_role("columnheader").all_text_contents() == [
        "run",
        "eval_kl",
    ]
    assert page.get_by_role("table", name="Against kd").get_by_role("rowheader").all_text_contents() == [
        *("before training", "low", "high"),
    ]


FOCUSED = """() => {
    const e = document.activeElement
    return e === document.body ? "" : `${e.className || e.tagName} ${(e.getAttribute("aria-label") || e.textContent)}`
}"""


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(opened):
    page = opened.page
    page.reload()
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUSED) == "skip Skip to the content"
    outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid" and page.locator(".skip").bounding_box()["x"] >= 0
    order = []
    while (focused := page.evaluate(FOCUSED)) and len(order) < 100:
        order.append(focused)
        page.keyboard.press("Tab")
    wanted = "a[href], summary, [tabindex='0']"
    expected = page.locator(wanted).evaluate_all(
        "all => all.filter(e => !e.closest('details') || e.tagName === 'SUMMARY').length"
    )
    assert len(order) == expected and order[1].startswith("A Training")
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.evaluate("each => each.open")


def test_a_narrow_screen_scrolls_tables_alone(opened):
    opened.page.set_viewport_size({"width": 360, "height": 800})
    widths = opened.page.evaluate("() => [document.documentElement.scrollWidth, window.innerWidth]")
    opened.page.set_viewport_size({"width": 1200, "height": 900})
    assert widths[0] <= widths[1]
