"""The same search on a cluster: Ray Tune makes the trials, the study says what to try and what to end."""
# pyright: reportMissingImports=false
# Ray is an extra that CI does not install.

import os
from pathlib import Path
from typing import Any

import yaml

from amid_trl.sweep.search import Search, SweptTrial, shown_changes
from amid_trl.sweep.trials import Evaluated, TrialFailed, evaluations


ONE_PROCESS = {"cpu": 1.0}
FOLDER_OF_RAY = "ray"


def search_on_cluster(search: Search) -> None:
    """Make the trials that are missing, as many at a time as the cluster has resources for.

    All machines need the output directory, the models and the data under the same paths. The cluster is that of
    RAY_ADDRESS, else this machine.
    """
    import ray
    from ray import tune

    if (missing := search.sweep.trials - search.done) <= 0:
        return
    begins = not ray.is_initialized()
    if begins:
        ray.init(include_dashboard=False, log_to_driver=False)
    bridge = _Bridge(search)
    try:
        tune.Tuner(
            tune.with_resources(_training(), dict(search.sweep.resources or ONE_PROCESS)),
            tune_config=tune.TuneConfig(
                search_alg=_searcher(bridge),
                scheduler=_scheduler(bridge),
                num_samples=missing,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(name=FOLDER_OF_RAY, storage_path=str(search.output_dir), verbose=0),
        ).fit()
    finally:
        if begins:
            ray.shutdown()


def _name(trial: Any) -> str:
    return str(trial.trial_id)  # by default it has all of the configuration in it


def _training() -> Any:
    """What Ray runs for a trial; a class, whose `cleanup` ends the training's processes when the trial is ended."""
    from ray import tune

    class Training(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            given = yaml.safe_load(config["trial"])
            self._steps = given["settings"]["budget"]["steps"]
            self._found = evaluations(given["settings"], given["metric"], Path(given["folder"]), given["cwd"])

        def step(self) -> dict[str, Any]:
            try:
                evaluated = next(self._found)
            except TrialFailed as failure:
                return {"failure": str(failure), "done": True}
            return {**evaluated._asdict(), "done": evaluated.step == self._steps}

        def cleanup(self) -> None:
            self._found.close()

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            return {}  # a training keeps its own

        def load_checkpoint(self, checkpoint: Any) -> None:
            pass

    return Training


class _Bridge:
    """Between Ray's trials and the study's."""

    def __init__(self, search: Search):
        self._search = search
        self._running: dict[str, SweptTrial] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing for Ray's own checkpoints: the study is the state."""
        return {}

    def begin(self, name: str) -> dict[str, Any] | None:
        """What the next trial is told."""
        if (trial := self._search.next_trial()) is None:
            return None
        self._running[name] = trial
        sweep = self._search.sweep
        given = {"settings": sweep.settings(trial.parameters), "metric": sweep.metric, "folder": str(trial.folder)}
        return {"trial": yaml.safe_dump({**given, "cwd": os.getcwd()})}  # keys of a mapping need not be text

    def is_to_end(self, name: str, result: dict[str, Any]) -> bool:
        """Whether a trial is pruned for what it has come to on its way."""
        if "failure" in result or self._last(result) or not self._search.report(self._running[name], _read(result)):
            return False
        trial = self._running.pop(name)
        self._say(trial, self._search.prune(trial, _read(result)))
        return True

    def end(self, name: str, result: dict[str, Any] | None) -> None:
        """A trial has ended, with its last result, or without where its worker was lost."""
        if (trial := self._running.pop(name, None)) is None:
            return  # it was pruned
        if result is None or not ("failure" in result or self._last(result)):
            self._say(trial, self._search.fail(trial, "its worker was lost"))
        elif "failure" in result:
            self._say(trial, self._search.fail(trial, result["failure"]))
        else:
            self._say(trial, self._search.complete(trial, _read(result)))

    def _last(self, result: dict[str, Any]) -> bool:
        return result["step"] == self._search.sweep.steps

    def _say(self, trial: SweptTrial, outcome: str) -> None:
        print(
            f"{trial.number + 1}/{self._search.sweep.trials} {shown_changes(self._search, trial)}: {outcome}",
            flush=True,
        )


def _read(result: dict[str, Any]) -> Evaluated:
    return Evaluated(result["step"], result["value"], result["rows"])


def _searcher(bridge: _Bridge) -> Any:
    from ray.tune.search import Searcher

    class StudySearcher(Searcher):
        def suggest(self, trial_id: str) -> Any:
            given = bridge.begin(trial_id)
            return Searcher.FINISHED if given is None else given

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            bridge.end(trial_id, None if error else result)

        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).touch()  # the study is the state

        def restore(self, checkpoint_path: str) -> None:
            pass

    return StudySearcher()


def _scheduler(bridge: _Bridge) -> Any:
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class StudyPruner(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
            return TrialScheduler.STOP if bridge.is_to_end(trial.trial_id, result) else TrialScheduler.CONTINUE

    return StudyPruner()
