"""The client of `amid-trl serve-teacher`: what it asks when, what it checks, and the head that it keeps."""

import threading
import time

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save
from states_server import changing, hosting, opened, wire
from tiny import tiny_llama, tiny_tokenizer

from amid_trl.data.batches import PromptTokens, completion_batch
from amid_trl.models.tokenizers import tokenizer_fingerprint
from amid_trl.teacher.connection import Connection
from amid_trl.teacher.exchange import question_bytes
from amid_trl.teacher.head_files import kept_head
from amid_trl.teacher.in_memory import ModelTeacher
from amid_trl.teacher.remote import RemoteTeacher


STATES = "/amid-trl/states"


@pytest.fixture
def model(tokenizer):
    return tiny_llama(tokenizer, seed=3)


def batch_of(seed: int, rows: int = 2, length: int = 6):
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, 360, (rows, 2, length), generator=draw)
    return completion_batch([PromptTokens(row[0]) for row in drawn], [row[1] for row in drawn], 0)


def connected(server, url: str | None = None, **connection) -> RemoteTeacher:
    line = Connection(url or server.url, **{"patience": 5.0, "backoff": 0.01, **connection})
    return RemoteTeacher(line, server.about, kept_head(server.about, line))


def asked(server) -> int:
    return server.questions.count(STATES)


def wait_until_asked(server, times: int) -> None:
    end = time.monotonic() + 10
    while asked(server) < times:
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_right(teacher, model, batch) -> None:
    want = ModelTeacher(model, Accelerator(cpu=True))(batch)
    torch.testing.assert_close(teacher(batch).hidden, want.hidden, rtol=1e-6, atol=1e-6)


# ---- What it asks, and when ----


def test_a_window_is_asked_about_at_once_and_picked_up_by_its_rows(model, tokenizer):
    window = [batch_of(seed) for seed in range(3)]
    with hosting(model, tokenizer) as server:
        teacher = connected(server)
        teacher.expect(window)
        wait_until_asked(server, 3)
        for batch in (window[2], window[0]):
            assert_right(teacher, model, batch)
        # The same rows dealt otherwise: half of them have been picked up.
        mixed = {name: torch.cat([window[1][name], window[0][name]]) for name in window[0]}
        assert asked(server) == 3
        assert_right(teacher, model, mixed)
        assert asked(server) == 4


def test_the_next_window_is_expected_while_one_is_trained(model, tokenizer):
    first, second, third = ([batch_of(3 * i + j) for j in range(2)] for i in range(3))
    with hosting(model, tokenizer) as server:
        teacher = connected(server)
        teacher.expect(first)
        teacher.expect(second)
        for batch in first:
            assert_right(teacher, model, batch)
        teacher.expect(second)  # which is no other window
        for batch in second:
            assert_right(teacher, model, batch)
        assert asked(server) == 4
        for times, window in ((6, third), (8, first), (10, second)):
            teacher.expect(window)
            wait_until_asked(server, times)
        assert_right(teacher, model, third[0])  # which is forgotten
        assert_right(teacher, model, first[0])
    assert asked(server) == 11 and sum(map(len, teacher._expected)) == 6


def test_what_is_forgotten_is_not_asked_any_more(model, tokenizer):
    with hosting(model, tokenizer) as server:
        turn = threading.Lock()
        forward = server.teacher._base.model.forward

        def slowly(*args, **kwargs):
            with turn:
                return forward(*args, **kwargs)

        server.teacher._base.model.forward = slowly
        teacher = connected(server)
        with turn:
            teacher.expect([batch_of(seed) for seed in range(40)])
            teacher.expect([])
            teacher.expect([])
        assert_right(teacher, model, batch_of(100))
    assert asked(server) <= 1 + 4  # those that were on their way


@pytest.mark.parametrize("bounds", [{"max_rows": 2}, {"max_tokens": 30}, {"max_body_bytes": 350}])
def test_a_request_is_as_large_as_the_server_takes(model, tokenizer, bounds):
    with hosting(model, tokenizer, **bounds) as server:
        assert_right(connected(server), model, batch_of(0, rows=5))
    assert asked(server) == 3


def test_a_row_that_stands_twice_is_asked_once(model, tokenizer):
    batch = batch_of(0)
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
    sizes = []
    with hosting(model, tokenizer) as server:
        answer = server.teacher.__class__.__call__
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                server.teacher.__class__, "__call__", lambda self, q: sizes.append(len(q.ends)) or answer(self, q)
            )
            hidden = connected(server)(twice).hidden
    assert sizes == [2] and hidden.shape == (24, 32) and torch.equal(hidden[:12], hidden[12:])


def test_the_head_lies_on_its_device_once(model, tokenizer):
    with hosting(model, tokenizer) as server:
        teacher = connected(server)
        first, second = teacher(batch_of(0)), teacher(batch_of(1))
    assert first.head is second.head and first.head.weight.data_ptr() != model.lm_head.weight.data_ptr()


# ---- What it checks ----


def shorter(path, headers, body):
    return save({"hidden": torch.zeros(11, 32)}) if path == STATES else body


def wider(path, headers, body):
    return save({"hidden": torch.zeros(12, 33)}) if path == STATES else body


def rounded(path, headers, body):
    return save({"hidden": torch.zeros(12, 32).half()}) if path == STATES else body


def nan(path, headers, body):
    hidden = torch.zeros(12, 32)
    hidden[7, 3] = torch.nan
    return save({"hidden": hidden}) if path == STATES else body


def nonsense(path, headers, body):
    return b"<html>" if path == STATES else body


def foreign(path, headers, body):
    if path == STATES:
        del headers["amid-trl-protocol"], headers["amid-trl-identity"]
    return body


def restarted(path, headers, body):
    if path == STATES:
        headers["amid-trl-identity"] = "another"
    return body


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (shorter, r"answered states of shape \(11, 32\) in torch.float32 where \(12, 32\) in torch.float32"),
        (wider, r"answered states of shape \(12, 33\) .* where \(12, 32\)"),
        (rounded, r"in torch.float16 where \(12, 32\) in torch.float32 were asked for"),
        (nan, r"not finite for a row of 12 tokens that begins with \[\d+, "),
        (nonsense, "gave no answer: this is no safetensors file"),
        (foreign, "is no amid-trl serve-teacher, and this is version 1"),
        (restarted, "is another one than at the start of this run: it was tiny .* it is another now. .*intact"),
    ],
)
def test_an_answer_that_cannot_be_the_teachers_is_refused(model, tokenizer, change, complaint):
    with hosting(model, tokenizer, meddle=changing(change)) as server:
        teacher = connected(server)
        with pytest.raises(ValueError, match=complaint):
            teacher(batch_of(0))
        teacher.expect([batch_of(1), batch_of(2)])
        with pytest.raises(ValueError, match=complaint):
            teacher(batch_of(2))
        assert teacher._expected == [{}, {}]


def test_a_server_that_is_away_for_a_while_is_waited_for(model, tokenizer, caplog):
    with hosting(model, tokenizer) as server, wire(server.port) as line:
        teacher = connected(server, line.url, patience=30.0)
        assert_right(teacher, model, batch_of(0))
        line.cut()
        teacher.expect([batch_of(1)])
        threading.Timer(0.5, lambda: setattr(line, "is_cut", False)).start()
        assert_right(teacher, model, batch_of(1))
    assert "does not answer" in caplog.text


def test_a_server_that_stays_away_ends_the_run_and_all_that_waits(model, tokenizer):
    with hosting(model, tokenizer) as server, wire(server.port) as line:
        teacher = connected(server, line.url, patience=0.5)
        line.cut()
        started = time.monotonic()
        teacher.expect([batch_of(seed) for seed in range(20)])
        with pytest.raises(ConnectionError, match=r"attempts, .*checkpoint is intact"):
            teacher(batch_of(0))
        teacher._threads.shutdown()
        assert time.monotonic() - started < 5.0, "the others do not begin their own half second"


def test_an_interruption_ends_what_waits(model, tokenizer):
    with hosting(model, tokenizer) as server, wire(server.port) as line:
        teacher = connected(server, line.url, patience=300.0, backoff=60.0)
        line.cut()
        teacher.expect([batch_of(0)])
        [request] = set(teacher._expected[1].values())
        time.sleep(0.2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(request.states), "result", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                teacher(batch_of(0))
        started = time.monotonic()
        teacher._threads.shutdown()
        assert time.monotonic() - started < 5.0


# ---- Before the first step ----


def test_it_opens_and_answers(model, tokenizer, caplog):
    with hosting(model, tokenizer, key="k") as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMID_TRL_API_KEY", "k")
        teacher = opened(server, tokenizer)
        assert (teacher.name, teacher.is_sparse, teacher.rows_at_once) == ("tiny", False, 32)
        assert_right(teacher, model, batch_of(0))
        patch.setenv("AMID_TRL_API_KEY", "another")
        with pytest.raises(ValueError, match=r"refuses \(401\): the key is missing.*; its key belongs in AMID_TRL"):
            opened(server, tokenizer)
    assert not caplog.text


def test_the_longest_row_is_compared_with_what_it_reads(tokenizer):
    with hosting(tiny_llama(tokenizer, max_position_embeddings=64), tokenizer, max_tokens=100) as server:
        opened(server, tokenizer, max_length=64)
        opened(server, tokenizer, max_length=500, positions=64)
        for length, tokens in ((65, "up to 65"), (None, "any number of")):
            complaint = (
                f"reads rows of at most 64 tokens; lower max_length={length}: a row of this run has {tokens} tok"
            )
            with pytest.raises(ValueError, match=complaint):
                opened(server, tokenizer, max_length=length)
        written = {"max_length": 36, "max_new_tokens": 40, "longest_row": 76}
        opened(server, tokenizer, positions=64, **written)
        with pytest.raises(ValueError, match=r"lower max_length=36 \+ max_new_tokens=40: .* up to 76 tokens"):
            opened(server, tokenizer, **written)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"max_tokens": 64}, r"takes requests of at most {} tokens \(--max-tokens\)"),
        (
            {"max_body_bytes": question_bytes(64, 1)},
            r"takes requests of at most {} bytes \(--max-body-bytes\), rows of 63",
        ),
    ],
    ids=str,
)
def test_the_longest_row_is_compared_with_a_request(model, tokenizer, bounds, words):
    [(name, most)] = bounds.items()
    rows = batch_of(0, length=32)
    with hosting(model, tokenizer, **bounds) as server:
        assert_right(opened(server, tokenizer), model, rows)
        assert asked(server) == 2
    complaint = words.format(most - 1) + ".*; lower max_length=64: a row of this run has up to 64 tokens"
    with hosting(model, tokenizer, **{name: most - 1}) as server, pytest.raises(ValueError, match=complaint):
        opened(server, tokenizer)


def test_a_teacher_of_fewer_tokens_is_refused(tokenizer):
    few = tiny_llama(tiny_tokenizer(vocab_size=300))
    complaint = r"token ids up to 359 but the teacher at .*, tiny, has 300 tokens"
    with hosting(few, tokenizer) as server, pytest.raises(ValueError, match=complaint):
        opened(server, tokenizer)


def test_another_tokenizer_is_refused_and_one_with_other_names_of_special_tokens_is_not(model, tokenizer, caplog):
    another = tiny_tokenizer(vocab_size=340)
    with hosting(model, another) as server, pytest.raises(ValueError, match="need the same tokenizer"):
        opened(server, tokenizer)
    more = tiny_tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    with hosting(model, more) as server:
        assert server.about.tokenizer != tokenizer_fingerprint(tokenizer)
        assert_right(opened(server, tokenizer), model, batch_of(0))
    other = tiny_tokenizer()
    other.add_tokens(["<theirs>"])
    mine = tiny_tokenizer()
    mine.add_tokens(["<mine>"])
    with hosting(tiny_llama(tokenizer, vocab_size=361), other) as server:
        teacher = opened(server, mine, vocabulary=361)
        assert "other names for 1 tokens" in caplog.text
        batch = batch_of(0)
        teacher(batch)
        batch["input_ids"][0, 3] = 360
        for ask in (teacher, lambda batch: teacher.expect([batch])):
            with pytest.raises(ValueError, match="means another thing to the teacher: id 360 \\('<mine>', to the te"):
                ask(batch)


def test_a_teacher_without_a_tokenizer_is_taken_at_its_word(model, tokenizer, caplog):
    with hosting(model, None) as server:
        opened(server, tokenizer)
    assert "Whether the teacher has the student's tokenizer is not known" in caplog.text


def test_a_field_without_effect_is_named(model, tokenizer, caplog):
    with hosting(model, tokenizer) as server:
        opened(server, tokenizer, teacher_top_k=50)
    assert "teacher_top_k=50 has no effect on training with the teacher at" in caplog.text
