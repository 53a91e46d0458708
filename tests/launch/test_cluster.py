"""The examples for Slurm and Kubernetes: two nodes that are this machine, which meet and train one student."""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import messages_dataset


FOLDER = Path(__file__).parents[2] / "examples" / "cluster"
SLURM, KUBERNETES = FOLDER / "slurm.sh", FOLDER / "pytorchjob.yaml"
# What Slurm itself would be: the hosts, and the task on both nodes.
SCONTROL = '#!/bin/bash\n[ "$*" = "show hostnames nodes[1-2]" ] && printf \'127.0.0.1\\nnode2\\n\'\n'
# The second node waits until the first one listens: accelerate wants the port to be free there, and it is one machine.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 9
shift
SLURM_NODEID=0 "$@" &
first=$!
until (exec 3<> /dev/tcp/127.0.0.1/$((20000 + SLURM_JOB_ID % 10000))) 2> /dev/null || ! kill -0 $first; do
    sleep 0.1
done
SLURM_NODEID=1 "$@"
second=$?
wait $first && exit $second
"""
LAUNCHERS = ("ACCELERATE_", "LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_")


def pods() -> dict[str, Any]:
    return yaml.safe_load(KUBERNETES.read_text())["spec"]["pytorchReplicaSpecs"]


def container(replica: str) -> dict[str, Any]:
    [found] = pods()[replica]["template"]["spec"]["containers"]
    return found


@pytest.fixture
def place(tmp_path, models) -> Path:
    """A folder that all nodes see, with run.yaml in it; and the commands that a cluster has."""
    messages_dataset(8).to_json(tmp_path / "data" / "train.jsonl")
    run = {"model_name_or_path": models["student"], "teacher_model_name_or_path": models["teacher"]}
    run |= {"dataset_name": str(tmp_path / "data"), "output_dir": str(tmp_path / "out"), "accelerate_config": "ddp"}
    run |= {"use_cpu": True, "bf16": False, "lmbda": 0.0, "max_steps": 2, "save_steps": 1, "report_to": "none"}
    run |= {"per_device_train_batch_size": 1, "disable_tqdm": True, "logging_steps": 1}
    written = yaml.safe_dump(run).replace(run["output_dir"], f'"{run["output_dir"]}"  # where all nodes see it')
    (tmp_path / "run.yaml").write_text(written)
    ours = f'#!/bin/bash\nexec {sys.executable} -m amid_trl "$@"\n'
    (tmp_path / "bin").mkdir()
    for name, script in {"scontrol": SCONTROL, "srun": SRUN, "amid-trl": ours}.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def environment(place: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    return {**kept, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", **more}


def free_port() -> int:
    """One of those that the script for Slurm takes."""
    for port in range(20000 + os.getpid() % 10000, 30000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def done(*processes: subprocess.Popen) -> str:
    """What they have said; all have to succeed."""
    said = [process.communicate(timeout=240)[0] for process in processes]
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-4000:]
    return "\n".join(said)


PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def test_both_can_be_read():
    for script in (SLURM.read_text(), container("Master")["args"][0]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert pods()["Master"]["template"] == pods()["Worker"]["template"]
    given = {each["name"]: int(each["value"]) for each in container("Master")["env"]}
    assert given["PODS"] == sum(replica["replicas"] for replica in pods().values())
    assert given["GPUS"] == container("Master")["resources"]["limits"]["nvidia.com/gpu"]
    mounted = {each["name"] for each in container("Master")["volumeMounts"]}
    assert mounted == {each["name"] for each in pods()["Master"]["template"]["spec"]["volumes"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurms_nodes_meet_and_a_job_that_is_started_again_goes_on(place):
    given = {"SLURM_JOB_NODELIST": "nodes[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    (place / "out" / "checkpoint-1").mkdir(parents=True)  # one that was never finished is not resumed from
    (place / "out" / "checkpoint-1" / "checkpoint-is-incomplete.txt").touch()
    for steps in ("max_steps: 2", "max_steps: 3"):
        text = (place / "run.yaml").read_text().replace("max_steps: 2", steps)
        (place / "run.yaml").write_text(text)
        job = {**given, "SLURM_JOB_ID": str(free_port() % 10000)}
        command = ["bash", str(SLURM), str(place / "run.yaml")]
        said = done(subprocess.Popen(command, env=environment(place, **job), cwd=place, **PIPES))
        assert "Memory per process, 2 in all" in said
    assert (place / "out" / "model.safetensors").exists()
    assert {path.name for path in (place / "out").glob("checkpoint-*")} >= {"checkpoint-1", "checkpoint-3"}
    assert said.count("'loss'") == 2  # of the third step alone, on both nodes


@pytest.mark.slow
def test_the_pods_meet(place):
    port = free_port()
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PODS": "2", "GPUS": "1"}
    command, nodes = [*container("Worker")["command"], *container("Worker")["args"]], []
    for rank in "01":
        started = subprocess.Popen(command, env=environment(place, RANK=rank, **given), cwd=place, **PIPES)
        nodes.append(started)
        while not listens(port) and started.poll() is None:
            time.sleep(0.1)
    assert "Memory per process, 2 in all" in done(*nodes)
    assert (place / "out" / "model.safetensors").exists()
