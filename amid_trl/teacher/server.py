"""A teacher behind HTTP: an OpenAI-compatible server that has vLLM's `prompt_logprobs`."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import urllib3
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amid_trl.data.batches import Batch, unpadded_rows
from amid_trl.data.rows import UNTRAINED
from amid_trl.maths.sparse import SparseTeacher, joined
from amid_trl.run import Run
from amid_trl.teacher.fields import TeacherFields


logger = logging.getLogger(__name__)

UNAVAILABLE = (500, 502, 503, 504)


# Requests on their way at the same time: enough to keep a server busy that batches by itself.
REQUESTS = 4


# What vLLM sends for -inf, which JSON does not have; a token that the teacher excludes is a token all the same.
NO_MASS = -9999.0


EXCLUDED = torch.finfo(torch.float32).min


# What float32 probabilities leave of 1 is known to this much. No tail is below it: one of exactly zero, where the
# student has some mass, would make KL(q || p) infinite.
ROUNDING = 2.0**-24


# Seconds that a connection may take; an answer may take longer.
CONNECT = 10.0


# By how much the listed probabilities may exceed 1, as a sum of rounded numbers.
EXCESS = 1e-3


class TeacherServer:
    """Log-probabilities of the teacher's `top_k` likeliest tokens, for rows of token ids.

    The server is asked for its model and for one short row at once: what it cannot do it says before the first step.

    A request has at most `batch_size` rows. If the connection fails or the server is unavailable (HTTP 500, 502, 503,
    504), it is made `attempts` times in all, `backoff` · (0, 2, 4, 8, …) seconds apart; `timeout` is for one of them.
    The key of a server that wants one is in the environment, as VLLM_API_KEY.
    """

    def __init__(
        self,
        url: str,
        top_k: int,
        vocabulary: int,
        *,
        batch_size: int = 8,
        timeout: float = 600.0,
        attempts: int = 8,
        backoff: float = 1.0,
    ):
        for name, value in {"top_k": top_k, "batch_size": batch_size, "attempts": attempts}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.url, self.vocabulary = url.rstrip("/").removesuffix("/v1"), vocabulary
        self.top_k = min(top_k, vocabulary)
        self._batch_size, self._attempts = batch_size, attempts
        # Unlike requests, urllib3 reads the body as part of the attempt: one that breaks off is repeated too.
        repeat = urllib3.Retry(
            attempts - 1, allowed_methods=None, status_forcelist=UNAVAILABLE, backoff_factor=backoff
        )
        key = os.environ.get("VLLM_API_KEY")
        self._http = urllib3.PoolManager(
            maxsize=REQUESTS,
            retries=repeat,
            timeout=urllib3.Timeout(connect=min(CONNECT, timeout), read=timeout),
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )
        about = self._ask("GET", "v1/models")["data"][0]
        self.model: str = about["id"]
        self._positions: int | None = about.get("max_model_len")
        self.log_probs([[0, 0]])

    def check(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        """ValueError if the server's tokenizer is another one, or its teacher does not read rows of that length."""
        if self._positions is not None and (max_length is None or max_length >= self._positions):
            raise ValueError(
                f"the teacher at {self.url} reads at most {self._positions - 1} tokens and writes one; lower "
                f"max_length={max_length}"
            )
        text = tokenizer.decode([*range(0, self.vocabulary, 1 + self.vocabulary // 500)], skip_special_tokens=True)
        question = {"model": self.model, "prompt": text, "add_special_tokens": False}
        try:
            answer = self._ask("POST", "tokenize", question)
        except ValueError as error:
            logger.warning("Whether the teacher has the student's tokenizer is not known: %s", error)
            return
        if answer["tokens"] != list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]):
            raise ValueError(f"the teacher at {self.url} has another tokenizer than the student")

    def log_probs(self, rows: Sequence[Sequence[int]]) -> list[SparseTeacher]:
        """For every row what the teacher expects after each of its tokens but the last, in float32 on the CPU.

        A position lists the likeliest tokens and the one that follows. ValueError if the server refuses, and with the
        row's index if an answer is not that of the row; ConnectionError if the server stays away.
        """
        starts = range(0, len(rows), self._batch_size)
        with ThreadPoolExecutor(REQUESTS) as pool:
            batches = pool.map(lambda start: self._batch(start, rows[start : start + self._batch_size]), starts)
            return [teacher for batch in batches for teacher in batch]

    def _batch(self, start: int, rows: Sequence[Sequence[int]]) -> list[SparseTeacher]:
        question = {
            "model": self.model,
            "prompt": [list(row) for row in rows],
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": self.top_k,
        }
        choices = self._ask("POST", "v1/completions", question)["choices"]
        if len(choices) != len(rows):
            raise ValueError(f"rows {start} to {start + len(rows) - 1}: {self.url} answered {len(choices)} rows")
        return [self._row(start + i, row, choice) for i, (row, choice) in enumerate(zip(rows, choices, strict=True))]

    def _row(self, index: int, row: Sequence[int], choice: Mapping[str, Any]) -> SparseTeacher:
        try:
            return _sparse(row, choice.get("prompt_logprobs"), self.top_k, self.vocabulary)
        except ValueError as error:
            raise ValueError(f"row {index}: {self.url} answered {error}") from error

    def _ask(self, method: str, path: str, question: Mapping[str, Any] | None = None) -> dict[str, Any]:
        url = f"{self.url}/{path}"
        try:
            response = self._http.request(method, url, json=question)
        except urllib3.exceptions.MaxRetryError as error:
            raise ConnectionError(
                f"the teacher at {url} did not answer in {self._attempts} attempts ({error.reason}). The run's last "
                "checkpoint is intact: resume from it when the server is back"
            ) from error
        if response.status != 200:
            raise ValueError(f"the teacher at {url} refuses ({response.status}): {response.data.decode()}")
        return response.json()


def _sparse(
    row: Sequence[int], answer: Sequence[Mapping[str, Any] | None] | None, top_k: int, vocabulary: int
) -> SparseTeacher:
    """The prompt_logprobs of a row as tensors; ValueError if they cannot be those of this row."""
    if answer is None:
        raise ValueError("no prompt_logprobs, which vLLM's server has")
    if len(answer) != len(row):
        raise ValueError(f"{len(answer)} tokens where the row has {len(row)}")
    shape = len(row) - 1, min(top_k + 1, vocabulary)
    ids, log_p = torch.zeros(shape, dtype=torch.long), torch.full(shape, -math.inf, dtype=torch.float64)
    for t in range(shape[0]):
        listed = {int(token): entry["logprob"] for token, entry in (answer[t + 1] or {}).items()}
        _check(listed, t + 1, row[t + 1], range(top_k, shape[1] + 1), vocabulary)
        ids[t, : len(listed)] = torch.tensor(list(listed))
        values = [EXCLUDED if x <= NO_MASS else x for x in listed.values()]
        log_p[t, : len(listed)] = torch.tensor(values, dtype=torch.float64)
    return SparseTeacher(ids, log_p.float(), _log_tail(log_p, vocabulary))


def _check(listed: Mapping[int, float], position: int, token: int, counts: range, vocabulary: int) -> None:
    if token not in listed:
        raise ValueError(f"tokens {list(listed)} at position {position} where the row has token {token}")
    if len(listed) not in counts:
        raise ValueError(f"{len(listed)} tokens at position {position} where {counts.start} were asked for")
    if not 0 <= min(listed) <= max(listed) < vocabulary:
        raise ValueError(f"tokens {list(listed)} at position {position}, which the vocabulary of {vocabulary} lacks")
    if not all(x <= 0 for x in listed.values()):  # nor is a NaN
        raise ValueError(f"log-probabilities {list(listed.values())} at position {position}")
    if (mass := sum(map(math.exp, listed.values()))) > 1 + EXCESS:
        raise ValueError(f"probabilities that sum to {mass:.3f} at position {position}")


def _log_tail(log_p: Float[Tensor, "tokens k"], vocabulary: int) -> Float[Tensor, " tokens"]:
    """The logarithm of what is left of 1, in float32; -inf where all of the vocabulary is listed."""
    left = -torch.expm1(log_p.logsumexp(-1))
    complete = (log_p > -math.inf).sum(-1) == vocabulary
    return left.clamp(min=ROUNDING).log().masked_fill(complete, -math.inf).float()


def open_server(run: Run[TeacherFields]) -> "ServedTeacher":
    """The teacher of `teacher_model_server_url`; a ValueError if it is another one's, or reads shorter rows."""
    server = TeacherServer(str(run.args.teacher_model_server_url), run.args.teacher_top_k, run.vocabulary)
    server.check(run.tokenizer, min((bound for bound in (run.args.max_length, run.positions) if bound), default=None))
    return ServedTeacher(server)


class ServedTeacher:
    """Asks a server about every row, whoever wrote it."""

    def __init__(self, server: TeacherServer):
        self._server = server

    def __call__(self, batch: Batch) -> SparseTeacher:
        """The predictions at the trained tokens, rows one after the other."""
        rows = list(unpadded_rows(batch))
        answers = self._server.log_probs([ids.tolist() for ids, _ in rows])
        trained = [labels[1:] != UNTRAINED for _, labels in rows]
        parts = [[part[where] for part in answer] for answer, where in zip(answers, trained, strict=True)]
        return joined(parts, batch["input_ids"].device)
