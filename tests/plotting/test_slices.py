"""Slices of a sweep have what sweep.json has."""

from amid_trl.plotting.slices import slices


def trial(number: int, state: str, value: float | None, lam: float, rate: float, kind: str, **way: float) -> dict:
    params = {"lam": lam, "rate": rate, "kind": kind}
    on_way = {step.removeprefix("at"): each for step, each in way.items()}
    return {"number": number, "state": state, "value": value, "params": params, "intermediate": on_way}


TRIALS = [
    trial(0, "complete", 2.0, 0.1, 1e-3, "b", at5=2.5),
    trial(1, "complete", 1.0, 0.9, 1e-4, "a", at5=1.5),
    trial(2, "pruned", None, 0.5, 1e-2, "a", at5=9.0),
    trial(3, "fail", None, 0.5, 1e-2, "a"),
]
SPACE = {
    "lam": {"low": 0.0, "high": 1.0},
    "rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "kind": {"a": {"x": 1}, "b": {"x": 2}},
}
RESULTS = {"metric": "eval_kl", "budget": {"steps": 10}, "space": SPACE, "trials": TRIALS, "best": TRIALS[1]}


def points(panel) -> list[tuple[float, float, str]]:
    return [(line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in panel.lines]


def test_a_panel_for_each_axis_has_every_finished_trial_and_a_star_for_the_best():
    lam, rate, kind, way = [axes for axes in slices(RESULTS).axes if axes.axison]
    assert points(lam) == [(0.1, 2.0, "o"), (0.9, 1.0, "*")]
    assert points(rate) == [(1e-3, 2.0, "o"), (1e-4, 1.0, "*")] and rate.get_xscale() == "log"
    assert points(kind) == [(1, 2.0, "o"), (0, 1.0, "*")]
    assert [tick.get_text() for tick in kind.get_xticklabels()] == ["a", "b"]
    assert [panel.get_xlabel() for panel in (lam, rate, kind)] == ["lam", "rate", "kind"]
    assert {panel.get_ylabel() for panel in (lam, rate, kind, way)} == {"eval_kl"}
    assert [list(zip(*line.get_data(), strict=True)) for line in way.lines] == [
        [(5, 2.5), (10, 2.0)],
        [(5, 1.5), (10, 1.0)],
        [(5, 9.0)],
    ]
    assert [line.get_linestyle() for line in way.lines] == ["-", "-", "--"]


def test_values_of_a_choice_are_labelled_as_the_study_does_and_without_a_figure_there_is_no_picture():
    listed = {"kind": [{"a": 1}, None, 2]}
    trials = [{**TRIALS[0], "params": {"kind": label}, "intermediate": {}} for label in ('{"a": 1}', None, 2)]
    [panel] = slices({**RESULTS, "space": listed, "trials": trials, "best": trials[0]}).axes
    assert [x for x, *_ in points(panel)] == [0, 1, 2]
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ['{"a": 1}', "None", "2"]
    assert slices({**RESULTS, "trials": TRIALS[2:], "best": None}) is None
