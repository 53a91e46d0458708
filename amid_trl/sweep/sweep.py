"""A sweep from its file to its results."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from amid_trl.fields import require_package
from amid_trl.outputs import sole_use
from amid_trl.sweep.ray_tune import search_on_cluster
from amid_trl.sweep.report import sweep_table, write_sweep
from amid_trl.sweep.search import STUDY, Search, search_here
from amid_trl.sweep.spec import check_space, read_sweep


def sweep(
    file: str | Path, output_dir: str | Path, backend: str = "optuna", report_only: bool = False
) -> dict[str, Any]:
    """Make the trials that are missing, and report: sweep.json and best.yaml in `output_dir`.

    Returns what sweep.json holds. `report_only` trains nothing.

    Raises:
        ImportError: the extra `sweep` is not installed, or `ray` for the backend of that name.
        ValueError: the file asks for what does not exist, or the folder holds the study of another sweep. Nothing has
            been trained then. Or the first three trials have all failed.
    """
    require_package("optuna", "sweep", "'amid_trl[sweep]'")
    if backend == "ray":
        require_package("ray", "--backend ray", "'amid_trl[ray]'")
    asked_for, asked = read_sweep(file)
    output_dir = Path(output_dir).resolve()
    if report_only and not (output_dir / STUDY).exists():
        raise ValueError(f"{output_dir} holds no {STUDY} to report")
    if not report_only:
        check_space(asked_for)
    # A report only reads, so it need not wait for a sweep that is running.
    with nullcontext() if report_only else sole_use(output_dir):
        search = Search(asked_for, asked, output_dir)
        if not report_only:
            search.forget_failures()
            {"optuna": search_here, "ray": search_on_cluster}[backend](search)
            search.drop_all_weights_but_the_bests()
        found = write_sweep(search)
        if not report_only:
            search.check()
    print(f"\n{sweep_table(found)}\n")
    return found
