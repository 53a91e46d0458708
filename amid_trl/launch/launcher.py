"""Processes started by accelerate's launcher."""

import signal
from collections.abc import Iterable
from typing import Any

import psutil
import torch

from amid_trl._trl import launch_command, launch_command_parser, load_config_from_file


def launch_arguments(launch_args: list[str], module: str, script_args: list[str]) -> Any:
    """What `accelerate launch … -m module …` parses; a process for each device where nothing says how many.

    accelerate itself refuses a file without a number. A machine without accelerators counts as one device, and all
    machines as alike.

    Raises:
        ValueError: a flag that accelerate does not know either.
    """
    if unknown := unknown_to_launcher(launch_args):
        raise ValueError(f"unknown arguments: {' '.join(unknown)}")
    args = launch_command_parser().parse_args([*launch_args, "-m", module, *script_args])
    if args.config_file is not None and args.num_processes is None:
        defaults: Any = load_config_from_file(args.config_file)
        if defaults.num_processes == -1:
            machines = args.num_machines or defaults.num_machines
            args.num_processes = machines * max(1, torch.accelerator.device_count())
    return args


def unknown_to_launcher(arguments: Iterable[str]) -> list[str]:
    """Those of the flags that `accelerate launch` does not know."""
    known = launch_command_parser()._option_string_actions
    return [flag for text in arguments if text.startswith("--") and (flag := text.split("=")[0]) not in known]


def accelerate_launch(launch_args: list[str], module: str, script_args: list[str]) -> None:
    """Launch the module's processes, and end them on SIGTERM: accelerate would leave a single one to itself.

    Raises:
        subprocess.CalledProcessError: a single process has failed.
        ChildFailedError: one of several has.
        SignalException: SIGTERM ended several.
    """
    args = launch_arguments(launch_args, module, script_args)
    previous = signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in psutil.Process().children()])
    try:
        launch_command(args)
    finally:
        signal.signal(signal.SIGTERM, previous)
