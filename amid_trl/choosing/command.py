"""`amid-trl landscape`: a grid of settings at the tokens that `amid-trl train` would train, without training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amid_trl.choosing.checks import FORWARD_PASSES, ROWS, check_counts
from amid_trl.choosing.grid import ALPHAS, LAMBDAS, Grid
from amid_trl.fields import json_dict, require_package
from amid_trl.launch import flags, recipes, script
from amid_trl.launch.checks import check_device
from amid_trl.maths.names import DIVERGENCE_NAMES, ORDERS
from amid_trl.outputs import versions, write_whole
from amid_trl.parser import OneLineParser
from amid_trl.training.objective_fields import check_objective


def measure_landscape(argv: Sequence[str]) -> int:
    """Write landscape.json, .md, .csv, .png and .svg into the run's output_dir, and say what they suggest."""
    own, of_train = _parser().parse_known_args(argv)
    axes = {name: getattr(own, name) for name in ("divergences", "orders", "alphas", "lambdas", "temperatures")}
    if not any(setting.uses_assistant for setting in Grid(**axes).settings):
        for name, default in (("alphas", ALPHAS), ("lambdas", LAMBDAS)):
            if axes[name] is not default:
                raise ValueError(f"--{name} has no effect on --orders {' '.join(own.orders)}, which have no assistant")
    check_counts(own.rows, own.tokens)
    of_train = recipes.resolve(of_train)
    # Most mistakes need no torch.
    if (config := flags.check_flags(of_train, "landscape")) is not None:
        require_package("matplotlib", "the heat map", "'amid_trl[plot]'")
        check_objective(config)
        check_device(config)
    parsed = script.parse(of_train, of_launcher=True)

    from amid_trl.choosing.tokens import check_alone, check_whole, trainer_landscape

    script_args, training_args, model_args, dataset_args = parsed
    check_alone(training_args)
    of_run = {training_args.divergence: json_dict(training_args.divergence_kwargs)}
    grid = Grid(**axes, divergence_kwargs={name: of_run[name] for name in of_run if name in axes["divergences"]})
    trainer = script.build_trainer(script_args, training_args, model_args, dataset_args)
    check_whole(trainer)
    found = trainer_landscape(trainer, grid, rows=own.rows, tokens=own.tokens, seed=training_args.seed)
    about = {
        "student": model_args.model_name_or_path,
        "teacher": trainer.teacher.name,
        "dataset": script_args.dataset_name,
        "seed": training_args.seed,
        "grid": vars(grid),
        "versions": versions(),
    }
    _write(Path(training_args.output_dir), found, about)
    trainer.end()
    return 0


def _write(folder: Path, found: Any, about: dict[str, Any]) -> None:
    from amid_trl.choosing.report import landscape_csv, landscape_table, results
    from amid_trl.plotting.heat_map import heat_map
    from amid_trl.plotting.theme import picture

    measured = {**results(found), "about": about}
    contents = {"json": json.dumps(measured) + "\n", "md": landscape_table(measured), "csv": landscape_csv(measured)}
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in contents.items():
        write_whole(folder / f"landscape.{kind}", content)
    print(measured["suggestion"]["reason"])
    # Last, so that a picture which cannot be drawn loses nothing that was measured.
    written = list(contents)
    if (figure := heat_map(measured)) is not None:
        for kind in ("png", "svg"):
            write_whole(folder / f"landscape.{kind}", picture(figure, kind))
            written.append(kind)
    print(f"{folder}: {', '.join(f'landscape.{kind}' for kind in written)}")


def _parser() -> OneLineParser:
    parser = OneLineParser(
        "amid-trl landscape",
        usage="amid-trl landscape [--alphas A ...] [--lambdas L ...] [...] [options of amid-trl train]",
        description="What each α, λ, divergence, order and temperature would do to the student, from one forward pass "
        "of each model over the first rows of the training set. Everything else is an option of `amid-trl train`, or "
        "in its --config.",
        allow_abbrev=False,
    )
    default = Grid()
    parser.add_argument("--alphas", nargs="+", type=float, default=ALPHAS, metavar="A", help="finite numbers")
    parser.add_argument("--lambdas", nargs="+", type=float, default=LAMBDAS, metavar="L", help="numbers in [0, 1]")
    for name, known in (("divergences", DIVERGENCE_NAMES), ("orders", ORDERS)):
        of = f"of {', '.join(known)} (default: {' '.join(getattr(default, name))})"
        parser.add_argument(f"--{name}", nargs="+", default=getattr(default, name), metavar=name[0].upper(), help=of)
    parser.add_argument(
        "--temperatures", nargs="+", type=float, default=default.temperatures, metavar="T", help="positive numbers"
    )
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of the training set (default: {ROWS})")
    parser.add_argument(
        "--tokens",
        type=int,
        help=f"trained tokens drawn of them (default: as many as take {FORWARD_PASSES} times as long as the forward "
        "passes, and at least 256)",
    )
    return parser
