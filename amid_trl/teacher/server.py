"""A teacher behind HTTP: an OpenAI-compatible server that has vLLM's `prompt_logprobs`."""

import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amid_trl.data.batches import Batch, unpadded_rows
from amid_trl.data.rows import UNTRAINED
from amid_trl.fields import is_of
from amid_trl.maths.sparse import SparseTeacher, joined
from amid_trl.run import Run
from amid_trl.teacher.connection import REQUESTS, Connection
from amid_trl.teacher.fields import TeacherFields
from amid_trl.teacher.reach import check_longest
from amid_trl.teacher.served import Served


logger = logging.getLogger(__name__)

# What vLLM sends for -inf, which JSON does not have; a token that the teacher excludes is a token all the same.
NO_MASS = -9999.0


EXCLUDED = torch.finfo(torch.float32).min


# What float32 probabilities leave of 1 is known to this much. No tail is below it: one of exactly zero, where the
# student has some mass, would make KL(q || p) infinite.
ROUNDING = 2.0**-24


# Tokens of the row that is asked about alone and beside others, and how many likeliest of each.
COMPANY_TOKENS, COMPANY_TOP_K = 64, 20


# The least probability of a token whose difference counts.
MATTERS = 1e-3


# Nats by which one row's answers may differ in other company: more than float32's rounding, less than bfloat16's.
COMPANY = 1e-3


# By how much the listed probabilities may exceed 1, as a sum of rounded numbers.
EXCESS = 1e-3


# What is answered where there is no such path, or none of this method.
NO_SUCH_PATH = (404, 405, 501)


class TeacherServer:
    """Log-probabilities of the teacher's `top_k` likeliest tokens, for rows of token ids.

    The server is asked for its model and for one short row at once: what it cannot do it says before the first step.

    A request has at most `batch_size` rows. `connection` says how long the server is waited for. The key of a server
    that wants one is in the environment, as VLLM_API_KEY.
    """

    def __init__(self, url: str, top_k: int, vocabulary: int, *, batch_size: int = 8, **connection: float):
        for name, value in {"top_k": top_k, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self._connection = Connection(url, key=os.environ.get("VLLM_API_KEY"), **connection)
        self.url, self.vocabulary = self._connection.url, vocabulary
        self.top_k, self.batch_size = min(top_k, vocabulary), batch_size
        try:
            about = self._ask("GET", "v1/models")["data"][0]
            self.model: str = about["id"]
            self._positions: int | None = about.get("max_model_len")
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(_no_such_server(self.url, "it does not list its models")) from error
        if not is_of(self.model, str) or not is_of(self._positions, int | None):
            said = f"id is {self.model!r} and whose max_model_len {self._positions!r}"
            raise ValueError(_no_such_server(self.url, f"it lists a model whose {said}"))
        self.log_probs([[0, 0]])

    @property
    def longest_row(self) -> int | None:
        """In tokens: it writes one more, for which there has to be room. None where it does not say."""
        return None if self._positions is None else self._positions - 1

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """ValueError if the server's tokenizer is another one."""
        text = tokenizer.decode([*range(0, self.vocabulary, 1 + self.vocabulary // 500)], skip_special_tokens=True)
        question = {"model": self.model, "prompt": text, "add_special_tokens": False}
        try:
            tokens = self._ask("POST", "tokenize", question).get("tokens")
            if not isinstance(tokens, list):
                raise ValueError(f"{self.url}/tokenize answered no tokens")
        except ValueError as error:
            logger.warning("Whether the teacher has the student's tokenizer is not known: %s", error)
            return
        if tokens != list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]):
            raise ValueError(
                f"the teacher at {self.url} has another tokenizer than the student, which only one in memory may have"
            )

    def check_company(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Warn if a row's answers depend on the rows beside it, as those of half precision do."""
        longest = min(COMPANY_TOKENS, self.longest_row or COMPANY_TOKENS)
        text = tokenizer.decode([*range(0, self.vocabulary, 1 + self.vocabulary // 500)], skip_special_tokens=True)
        row = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[:longest]
        if len(row) < 2:
            return
        others = [row[start:] + row[:start] for start in range(1, self.batch_size)]
        k = min(self.top_k, COMPANY_TOP_K)
        [alone], (among, *_) = self._batch(0, [row], k), self._batch(0, [row, *others], k)
        difference = _largest_difference(alone, among)
        if difference > COMPANY:
            logger.warning(
                "What the teacher at %s expects of a row depends on the rows beside it, by up to %.2g nats here: it "
                "computes in half precision, and a run does not repeat itself. `vllm serve … --dtype float32` is "
                "exact.",
                self.url,
                difference,
            )

    def log_probs(self, rows: Sequence[Sequence[int]]) -> list[SparseTeacher]:
        """For every row what the teacher expects after each of its tokens but the last, in float32 on the CPU.

        A position lists the likeliest tokens and the one that follows. ValueError if the server refuses, and with the
        row's index if an answer is not that of the row; ConnectionError if the server stays away.
        """
        starts = range(0, len(rows), self.batch_size)
        with ThreadPoolExecutor(REQUESTS) as pool:
            batches = pool.map(lambda start: self._batch(start, rows[start : start + self.batch_size]), starts)
            return [teacher for batch in batches for teacher in batch]

    def _batch(self, start: int, rows: Sequence[Sequence[int]], top_k: int | None = None) -> list[SparseTeacher]:
        k = top_k or self.top_k
        question = {
            "model": self.model,
            "prompt": [list(row) for row in rows],
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": k,
        }
        choices = self._ask("POST", "v1/completions", question).get("choices") or []
        if not is_of(choices, list) or not all(is_of(choice, dict) for choice in choices):
            raise ValueError(_no_such_server(self.url, "its completions have no choices"))
        if len(choices) != len(rows):
            raise ValueError(f"rows {start} to {start + len(rows) - 1}: {self.url} answered {len(choices)} rows")
        if "prompt_logprobs" not in choices[0]:
            raise ValueError(_no_such_server(self.url, "its answers have no prompt_logprobs"))
        answers = zip(rows, choices, strict=True)
        return [self._row(start + i, row, choice, k) for i, (row, choice) in enumerate(answers)]

    def _row(self, index: int, row: Sequence[int], choice: Mapping[str, Any], top_k: int) -> SparseTeacher:
        try:
            return _sparse(row, choice.get("prompt_logprobs"), top_k, self.vocabulary)
        except ValueError as error:
            raise ValueError(f"row {index}: {self.url} answered {error}") from error
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"row {index}: {self.url} answered what are no prompt_logprobs: {error!r}") from error

    def _ask(self, method: str, path: str, question: Mapping[str, Any] | None = None) -> dict[str, Any]:
        response = self._connection.request(method, path, json=question)
        if response.status != 200:
            if response.status in NO_SUCH_PATH:
                raise ValueError(_no_such_server(self.url, f"to {path} it answers {response.status}"))
            text = response.data.decode(errors="replace")
            raise ValueError(f"the teacher at {self.url}/{path} refuses ({response.status}): {text:.500}")
        try:
            answer = response.json()
        except ValueError as error:
            raise ValueError(_no_such_server(self.url, f"what it says to {path} is not JSON")) from error
        if not is_of(answer, dict):
            raise ValueError(_no_such_server(self.url, f"what it says to {path} is no dict"))
        return answer


def _no_such_server(url: str, why: str) -> str:
    return (
        f"{url} is no amid-trl serve-teacher, and is not a server of the kind that is needed, {why}: the "
        "log-probabilities of a prompt's tokens, prompt_logprobs, are vLLM's. llama.cpp's server, for one, has none"
    )


def _largest_difference(one: SparseTeacher, other: SparseTeacher) -> float:
    """Of the log-probabilities that both list, of the tokens that matter: a nat of an unlikely one is of no weight."""
    largest = 0.0
    for ids, log_p, others, log_others in zip(one.ids, one.log_p, other.ids, other.log_p, strict=True):
        there = dict(zip(others.tolist(), log_others.tolist(), strict=True))
        for token, value in zip(ids.tolist(), log_p.tolist(), strict=True):
            if value > math.log(MATTERS) and there.get(token, -math.inf) > -math.inf:
                largest = max(largest, abs(value - there[token]))
    return largest


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
        _check(listed, t + 1, row[t + 1], range(top_k, top_k + 2))
        values = _within(listed, vocabulary)
        ids[t, : len(values)] = torch.tensor(list(values))
        log_p[t, : len(values)] = torch.tensor(list(values.values()), dtype=torch.float64)
    return SparseTeacher(ids, log_p.float(), _log_tail(log_p, vocabulary))


def _within(listed: Mapping[int, float], vocabulary: int) -> dict[int, float]:
    """The tokens that there are, with what the model gives to the padding of its head shared out to all of them.

    As the cut of a head in memory, as far as the padding is among the listed.
    """
    values = {token: EXCLUDED if x <= NO_MASS else x for token, x in listed.items()}
    kept = {token: x for token, x in values.items() if token < vocabulary}
    if len(kept) == len(values):
        return kept
    mass = sum(map(math.exp, kept.values()))
    padding = sum(math.exp(x) for token, x in values.items() if token not in kept)
    whole = math.log(max(1 - padding, mass, sys.float_info.min))
    return {token: x - whole if x > EXCLUDED else x for token, x in kept.items()}


def _check(listed: Mapping[int, float], position: int, token: int, counts: range) -> None:
    if token not in listed:
        raise ValueError(f"tokens {list(listed)} at position {position} where the row has token {token}")
    if len(listed) not in counts:
        raise ValueError(f"{len(listed)} tokens at position {position} where {counts.start} were asked for")
    if min(listed) < 0:
        raise ValueError(f"tokens {list(listed)} at position {position}")
    if not all(x <= 0 for x in listed.values()):  # nor is a NaN
        raise ValueError(f"log-probabilities {list(listed.values())} at position {position}")
    if (mass := sum(map(math.exp, listed.values()))) > 1 + EXCESS:
        raise ValueError(f"probabilities that sum to {mass:.3f} at position {position}")


def _log_tail(log_p: Float[Tensor, "tokens k"], vocabulary: int) -> Float[Tensor, " tokens"]:
    """The logarithm of what is left of 1, in float32; -inf where all of the vocabulary is listed."""
    left = -torch.expm1(log_p.logsumexp(-1))
    complete = (log_p > -math.inf).sum(-1) == vocabulary
    return left.clamp(min=ROUNDING).log().masked_fill(complete, -math.inf).float()


def open_server(run: Run[TeacherFields], longest_row: int | None) -> "ServedTeacher":
    """The teacher of `teacher_model_server_url`; a ValueError if it is another one's, or reads shorter rows."""
    args = run.args
    patience = args.teacher_server_patience
    server = TeacherServer(str(args.teacher_model_server_url), args.teacher_top_k, run.vocabulary, patience=patience)
    reads = server.longest_row
    check_longest(run, longest_row, {f"reads at most {reads} tokens and writes one": reads})
    server.check(run.tokenizer)
    if run.accelerator.is_main_process:
        server.check_company(run.tokenizer)
    return ServedTeacher(server)


class ServedTeacher:
    """Asks a server about every row, whoever wrote it."""

    is_far, is_sparse, asks_together = False, True, False

    def __init__(self, server: TeacherServer):
        self._server, self.name, self.longest_row = server, server.model, server.longest_row
        self.rows_at_once = REQUESTS * server.batch_size
        self._served = Served(server.url, server.model)

    def state_dict(self) -> dict[str, Any]:
        """Who it is, as far as its server says."""
        return self._served.state_dict()

    def resume(self, states: Sequence[Mapping[str, Any]], rank: int, world: int) -> None:
        """ValueError if it is not the teacher of an earlier run."""
        self._served.resume(states, rank, world)

    def expect(self, batches: Sequence[Batch]) -> None:
        """Asked when the loss needs it."""

    def __call__(self, batch: Batch) -> SparseTeacher:
        """The predictions at the trained tokens, rows one after the other."""
        rows = list(unpadded_rows(batch))
        answers = self._server.log_probs([ids.tolist() for ids, _ in rows])
        trained = [labels[1:] != UNTRAINED for _, labels in rows]
        parts = [[part[where] for part in answer] for answer, where in zip(answers, trained, strict=True)]
        return joined(parts, batch["input_ids"].device)
