"""A server on loopback that speaks vLLM's completions with `prompt_logprobs` for a tiny model, well or badly."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import torch


HANG_UP = 0
CUT_SHORT = -1


class LogprobServer(ThreadingHTTPServer):
    """Answers like vLLM. `faults` are used up first, one by each POST: HANG_UP, CUT_SHORT or an HTTP status.

    `tamper` may change an answer's choices, given the prompts, before they are sent; not those of a probe of 2 tokens.
    """

    daemon_threads = True

    def __init__(self, model, max_logprobs: int = 20, tokenizer=None, max_model_len: int | None = None, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.model, self.max_logprobs, self.name = model, max_logprobs, "tiny"
        self.tokenizer, self.max_model_len = tokenizer, max_model_len  # without a tokenizer there is no /tokenize
        self.keys: list[str | None] = []  # what came with the POSTs
        self.faults: list[int] = []
        self.tamper: Callable[[list[dict], list[list[int]]], list[dict]] = lambda choices, prompts: choices
        self.questions: list[dict[str, Any]] = []  # the POSTs that came, faults included
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def choices(self, prompts: list[list[int]], k: int) -> list[dict[str, Any]]:
        return [
            {"index": i, "text": "", "prompt_logprobs": self._prompt_logprobs(torch.tensor([prompt]), k)}
            for i, prompt in enumerate(prompts)
        ]

    @torch.no_grad()
    def _prompt_logprobs(self, ids: torch.Tensor, k: int) -> list[dict[str, Any] | None]:
        rows = self.model(ids).logits[0, :-1].float().log_softmax(-1)
        answer: list[dict[str, Any] | None] = [None]
        for log_p, own in zip(rows, ids[0, 1:].tolist(), strict=True):
            by_rank = log_p.argsort(descending=True).tolist()
            listed = dict.fromkeys([own, *by_rank[:k]])  # its own token comes first, whatever its rank
            answer.append(
                {str(t): {"logprob": max(log_p[t].item(), -9999.0), "rank": by_rank.index(t) + 1} for t in listed}
            )
        return answer


class _Handler(BaseHTTPRequestHandler):
    server: LogprobServer

    def do_GET(self):
        about = {"id": self.server.name, "max_model_len": self.server.max_model_len}
        self._send(200, {"data": [about]} if self.path == "/v1/models" else {})

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self._tokenize(question)
            return
        with self.server.lock:
            self.server.questions.append(question)
            self.server.keys.append(self.headers["Authorization"])
            fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == HANG_UP:
            return
        if fault not in (None, CUT_SHORT):
            self._send(fault, {"message": "try again"})
            return
        k, allowed = question["prompt_logprobs"], self.server.max_logprobs
        if k > allowed:
            text = f"Requested prompt logprobs of {k}, which is greater than max allowed: {allowed}"
            self._send(400, {"error": {"message": text}})
            return
        prompts = question["prompt"]
        choices = self.server.choices(prompts, k)
        if max(map(len, prompts)) > 2:
            choices = self.server.tamper(choices, prompts)
        self._send(200, {"choices": choices}, cut_short=fault == CUT_SHORT)

    def _tokenize(self, question: dict[str, Any]):
        if self.server.tokenizer is None:
            self._send(404, {"detail": "Not Found"})
            return
        settings = {"add_special_tokens": question["add_special_tokens"], "verbose": False}
        self._send(200, {"tokens": self.server.tokenizer(question["prompt"], **settings)["input_ids"]})

    def _send(self, status: int, answer: dict[str, Any], cut_short: bool = False):
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut_short else body)

    def log_message(self, format, *args):
        """Nothing on the terminal."""


@contextmanager
def serving(model, **settings) -> Iterator[LogprobServer]:
    """A LogprobServer that runs until the block ends."""
    with LogprobServer(model.eval(), **settings) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
