"""A real vLLM server on this machine's CPU, in a process of its own; see `make test-vllm`."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import urllib3
from states_server import free_port


needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm")

STARTING = 900.0  # seconds: it imports vLLM in two processes, one after the other

ENVIRONMENT = {
    **os.environ,
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # TRL asks a server that shall write for its configuration
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
}


class VLLMServer:
    """One server at a time, always on the same port. A test says what it needs, and gets what runs if it is that."""

    def __init__(self, folder: Path):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "vllm.log"
        self._serves: tuple[str, ...] = ()
        self._process: subprocess.Popen | None = None

    def serve(self, *arguments: str, waits: bool = True) -> str:
        """Have a model served, with these arguments of vLLM's; the address."""
        if self._process is None or self._serves != arguments:
            self.stop()
            self._serves = arguments
            # Not the `vllm` command, which asks for the version of a distribution called vllm; this one is vllm-cpu.
            module = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"]
            where = ["--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"]
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    [*module, "--model", *arguments, *where],
                    **{"env": ENVIRONMENT, "stdout": log, "stderr": log, "start_new_session": True},
                )
        if waits:
            self._wait()
        return self.url

    def stop(self) -> None:
        """As a machine that fails: with its engine, which is a process of its own."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait(60)
            self._process = None

    def _wait(self) -> None:
        http, end = urllib3.PoolManager(retries=False), time.monotonic() + STARTING
        while True:
            assert self._process.poll() is None and time.monotonic() < end, self._log.read_text()[-4000:]
            try:
                if http.request("GET", f"{self.url}/health", timeout=5.0).status == 200:
                    return
            except urllib3.exceptions.HTTPError:
                time.sleep(0.2)
