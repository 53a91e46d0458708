"""One vLLM server for all of these tests: it takes minutes to start."""

import pytest
from vllm_server import VLLMServer


@pytest.fixture(scope="session")
def vllm(tmp_path_factory):
    server = VLLMServer(tmp_path_factory.mktemp("vllm"))
    yield server
    server.stop()
