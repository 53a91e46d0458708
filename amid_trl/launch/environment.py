"""`amid-trl env`: what a report of a mistake needs, and nothing that is secret."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

import amid_trl
from amid_trl.parser import OneLineParser


# Asked for by our requirements, and often at fault.
BELOW = {"huggingface_hub", "liger_kernel", "numpy", "safetensors", "tokenizers", "triton"}
# What there is in any case, for a folder that was not installed.
ALWAYS = {"accelerate", "datasets", "peft", "torch", "transformers", "trl"}
# Requirements of these extras say how the package is made, not how it runs.
DEVELOPMENT = {"dev", "docs", "test"}
# Variables that change what a run does begin so.
VARIABLES = re.compile(
    "ACCELERATE_|AMID_TRL_|CUDA_|CUBLAS_|CUDNN_|CXX$|DS_|FSDP_|GLOO_|HF_|HIP_|LOCAL_|MASTER_|MKL_|NCCL_|NVIDIA_|OMP_|PYTHON|"
    "PYTORCH_|RANK$|ROCM_|ROCR_|SLURM_JOB_NUM_NODES|SLURM_NTASKS|TOKENIZERS_|TORCH|TRANSFORMERS_|TRITON_|TRL_|VLLM_|"
    "WORLD_SIZE$|WANDB_MODE|XDG_CACHE_HOME$"
)
SECRET = re.compile("TOKEN(?!IZERS)|KEY|SECRET|PASS|AUTH|CREDENTIAL", re.IGNORECASE)
# Of accelerate's configuration; the others may hold addresses and secrets of a cluster.
ACCELERATE = (
    *("compute_environment", "distributed_type", "mixed_precision", "num_processes", "num_machines", "use_cpu"),
    *("dynamo_config", "deepspeed_config", "fsdp_config", "parallelism_config"),
)


def show_environment(argv: Sequence[str]) -> int:
    """Print it in Markdown; the exit status."""
    OneLineParser("amid-trl env", description="Print what a bug report needs. Nothing secret is shown.").parse_args(
        argv
    )
    sections = {
        "Packages": packages(),
        "System": system(),
        "accelerate's configuration": accelerate_config(),
        "Environment variables": variables(os.environ),
    }
    for title, found in sections.items():
        print(f"{title}:")
        print("".join(f"- {name}: {value}\n" for name, value in found.items()) or "- none\n")
    return 0


def packages() -> dict[str, str]:
    """What is installed of this package's requirements and extras."""
    found = {"amid_trl": amid_trl.__version__, **_commit(), "Python": platform.python_version()}
    for name in _required():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> dict[str, str]:
    """Of a clone, its commit, and whether it was changed since."""
    clone = Path(amid_trl.__file__).parents[1]
    if not (clone / ".git").exists() or shutil.which("git") is None:
        return {}
    command = ["git", "-C", str(clone), "describe", "--always", "--dirty", "--exclude=*"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"its commit": said.stdout.strip()} if said.returncode == 0 else {}


def _required() -> Iterator[str]:
    """Names, sorted."""
    from packaging.requirements import Requirement

    try:
        about = metadata("amid_trl")
    except PackageNotFoundError:  # run out of a folder without being installed
        yield from sorted(ALWAYS | BELOW)
        return
    extras = {"", *(about.get_all("Provides-Extra") or [])} - DEVELOPMENT
    asked = [Requirement(line) for line in about.get_all("Requires-Dist") or []]
    ours = {each.name for each in asked if not each.marker or any(each.marker.evaluate({"extra": e}) for e in extras)}
    yield from sorted(ours | BELOW)


def system() -> dict[str, Any]:
    """The machine, and how torch sees it."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "CPU cores": os.cpu_count(),
        "C++ compiler, without which the loss is not compiled": shutil.which(os.environ.get("CXX", "g++")) or "none",
    }
    try:
        import torch
    except Exception as error:  # a torch that does not load is what the report is about
        return {**found, "torch": f"does not load: {type(error).__name__}: {error}"}
    built = {name: number for name in ("cuda", "hip", "xpu") if (number := getattr(torch.version, name, None))}
    found["torch is built for"] = ", ".join(f"{name} {number}" for name, number in built.items()) or "CPU"
    found["torch's CPU kernels"] = torch.backends.cpu.get_cpu_capability()
    found["torch's threads"] = torch.get_num_threads()
    backends = ("nccl", "gloo", "mpi", "ucc", "xccl") if torch.distributed.is_available() else ()
    found["process groups"] = ", ".join(name for name in backends if torch.distributed.is_backend_available(name))
    count = torch.accelerator.device_count()
    found["accelerators"] = count or "none"
    if torch.cuda.is_available():
        for index in range(count):
            about = torch.cuda.get_device_properties(index)
            found[f"cuda:{index}"] = f"{about.name}, {about.total_memory / 2**30:.1f} GiB, {about.major}.{about.minor}"
    return found


def accelerate_config() -> dict[str, Any]:
    """The file that `accelerate config` has written, if there is one: its path and what it says of the engine."""
    from amid_trl._trl import default_config_file, load_config_from_file

    path = default_config_file
    if not os.path.isfile(path):
        return {}
    try:
        config = vars(load_config_from_file(path))
    except Exception as error:  # accelerate raises what YAML raises, and more
        return {path: f"cannot be read: {type(error).__name__}: {error}"}
    return {"file": path, **{name: config[name] for name in ACCELERATE if config.get(name) not in (None, {})}}


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Those that change what a run does; of a secret one only that it is set, of a URL not who is let in."""
    return {name: _shown(name, environ[name]) for name in sorted(environ) if VARIABLES.match(name)}


def _shown(name: str, value: str) -> str:
    return "is set, not shown" if SECRET.search(name) else re.sub(r"://[^/@\s]*@", "://…@", value)
