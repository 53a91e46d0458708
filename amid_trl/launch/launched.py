"""The commands that run under accelerate: parsed here, done by the processes that its launcher starts."""

import signal
import subprocess
import sys
from importlib import import_module

from amid_trl.launch import accelerate_configs, flags, recipes, script
from amid_trl.launch.checks import check_device
from amid_trl.training.objective_fields import check_objective


# What a shell reports of a process that Ctrl-C has ended.
INTERRUPTED = 128 + signal.SIGINT


def launch(command: str, module: str, argv: list[str]) -> int:
    """Start the processes of `module`, or be one of them; the exit status."""
    try:
        return _worked(command, module, argv) if script.is_launched() else _started(command, module, argv)
    except KeyboardInterrupt:
        print(f"\namid-trl {command}: stopped", file=sys.stderr)
        return INTERRUPTED


def _worked(command: str, module: str, argv: list[str]) -> int:
    """Be one of the processes that accelerate or torchrun has started."""
    try:
        parsed = script.parse(argv)
    except (ValueError, OSError, ImportError) as error:
        return _refuse(command, error)
    from amid_trl.training.sigterm import stop_on_ctrl_c

    stop_on_ctrl_c()
    try:
        import_module(module).main(*parsed)
    except script.NotTrained as error:
        return _refuse(command, error)
    return 0


def _started(command: str, module: str, argv: list[str]) -> int:
    try:
        argv = recipes.resolve(argv)
        # Help and most mistakes need no torch, and what an objective's parameters may be nothing else.
        if (config := flags.check_flags(argv, command)) is not None:
            print(f"amid-trl {command}: the settings are read; loading PyTorch and TRL", flush=True)
            check_objective(config)
            check_device(config)
        # Parsed here once, so that other mistakes are one line too; what the parser does not know is for accelerate.
        *_, from_config, from_flags = script.parse_with(script.make_parser(prog=f"amid-trl {command}"), argv)
        launch_args = accelerate_configs.resolve([*from_config, *from_flags])
        status = _launched(launch_args, module, _without(argv, from_flags))
    except (ValueError, OSError, ImportError) as error:
        return _refuse(command, error)
    if status < 0 and command == "train" and config is not None:
        _say_how_to_go_on(command, -status, config.output_dir)
    return status


def _say_how_to_go_on(command: str, signal_number: int, output_dir: str) -> None:
    from amid_trl.training.checkpoints import newest_complete

    checkpoint = newest_complete(output_dir)
    if checkpoint is not None:
        print(
            f"amid-trl {command}: a process was killed (signal {signal_number}). {checkpoint} is whole: the same "
            "command goes on from it with --resume_from_checkpoint true",
            file=sys.stderr,
        )


def _launched(launch_args: list[str], module: str, script_args: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from amid_trl.launch.launcher import accelerate_launch

    try:
        accelerate_launch(launch_args, module, script_args)
    # The processes themselves have said why.
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _refuse(command: str, error: Exception) -> int:
    print(f"amid-trl {command}: {error}", file=sys.stderr)
    return 2


def _without(argv: list[str], removed: list[str]) -> list[str]:
    """`argv` without the strings of `removed`, which occur in it in this order."""
    kept, pending = [], list(removed)
    for text in argv:
        if pending and text == pending[0]:
            pending.pop(0)
        else:
            kept.append(text)
    return kept
