"""Processes started by accelerate's launcher."""

import os
import signal
import sys
from collections.abc import Iterable
from typing import Any

import psutil
import torch

from amid_trl._trl import default_config_file, launch_command, launch_command_parser, load_config_from_file


# From these accelerate takes how many threads a process has, or how many processes MPI has put on a machine.
THREADS = ("OMP_NUM_THREADS", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")

STOPPING = "Stopping: a training ends with its step and saves a checkpoint. Ctrl-C again ends it at once."


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
    if args.config_file is None and (args.cpu or not os.path.isfile(default_config_file)):
        _fill_in(args)
    if args.config_file is not None and args.num_processes is None:
        defaults: Any = load_config_from_file(args.config_file)
        if defaults.num_processes == -1:
            machines = args.num_machines or defaults.num_machines
            args.num_processes = machines * max(1, torch.accelerator.device_count())
    return args


def _fill_in(args: Any) -> None:
    """Set what accelerate would set by itself, with a line about each."""
    devices = max(1, torch.accelerator.device_count())
    # One process for each of several devices; the other ways to use them exclude this flag.
    others = (args.cpu, args.tpu, args.use_deepspeed, args.use_fsdp, args.use_megatron_lm)
    defaults = {"num_processes": devices, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if devices > 1 and args.num_processes > 1 and not any(others):
        args.multi_gpu = True
    if args.cpu and args.num_cpu_threads_per_process is None and not any(name in os.environ for name in THREADS):
        on_each = max(1, args.num_processes // args.num_machines)
        args.num_cpu_threads_per_process = max(1, (psutil.cpu_count(logical=False) or 1) // on_each)


def unknown_to_launcher(arguments: Iterable[str]) -> list[str]:
    """Those of the flags that `accelerate launch` does not know."""
    known = launch_command_parser()._option_string_actions
    return [flag for text in arguments if text.startswith("--") and (flag := text.split("=")[0]) not in known]


def accelerate_launch(launch_args: list[str], module: str, script_args: list[str]) -> None:
    """Launch the module's processes, and end them on SIGTERM: accelerate would leave a single one to itself.

    The first Ctrl-C is a SIGTERM to them, the second kills them. They are deaf to it (`script.process`): a
    terminal sends it to a single one as well.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when they have ended.
        subprocess.CalledProcessError: a single process has failed.
        ChildFailedError: one of several has.
        SignalException: SIGTERM ended several.
    """
    args = launch_arguments(launch_args, module, script_args)
    args.signals_to_handle = "SIGTERM,SIGHUP,SIGQUIT"  # by torchrun: all but SIGINT
    interrupts = 0

    def terminate(*_: object) -> None:
        for child in psutil.Process().children():
            child.terminate()

    def interrupt(*_: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts == 1:
            print(f"\n{STOPPING}", file=sys.stderr)
            terminate()
        else:
            for child in psutil.Process().children(recursive=True):
                child.kill()

    handlers = {signal.SIGTERM: terminate, signal.SIGINT: interrupt}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        launch_command(args)
    except Exception as error:
        if interrupts:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
