"""A teacher behind HTTP gives the numbers of the same teacher in memory, and what a bad answer gives has a name."""

import math
import re
import threading
import time

import pytest
import torch
from server import CUT_SHORT, HANG_UP, LogprobServer, serving
from tiny import tiny_llama, tiny_tokenizer

from amid_trl import OBJECTIVES
from amid_trl.maths.sparse import SparseTokenLoss
from amid_trl.maths.token_loss import DistillationTokenLoss
from amid_trl.teacher.server import EXCLUDED, TeacherServer


VOCAB = 360
ROWS = [[5, 9, 300, 7], [1, 2], [8, 8, 8, 8, 8, 41], [359, 0, 17], [11]]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(tiny_tokenizer(), seed=3).eval()


@pytest.fixture
def server(model):
    with serving(model) as running:
        yield running


def connect(server, top_k: int = 8, vocabulary: int = VOCAB, **settings) -> TeacherServer:
    return TeacherServer(server.url, top_k, vocabulary, **{"patience": 5.0, "backoff": 0.001, **settings})


@torch.no_grad()
def in_memory(model, row: list[int]) -> torch.Tensor:
    """Log-probabilities after every token but the last."""
    return model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_it_lists_the_likeliest_tokens_and_the_next_one_in_the_order_of_the_rows(model, server, batch_size):
    answers = connect(server, batch_size=batch_size).log_probs(ROWS)
    assert [len(answer.ids) for answer in answers] == [3, 1, 5, 2, 0]
    for row, answer in zip(ROWS, answers, strict=True):
        assert answer.ids.shape == answer.log_p.shape == (len(row) - 1, 9)
        for log_p, token, ids, values, log_tail in zip(in_memory(model, row), row[1:], *answer, strict=True):
            listed = ids[values > -math.inf]
            assert set(listed.tolist()) == {token, *log_p.topk(8).indices.tolist()}
            torch.testing.assert_close(values[values > -math.inf].double(), log_p[listed], rtol=1e-5, atol=1e-5)
            rest = log_p.exp().sum() - log_p[listed].exp().sum()
            assert log_tail.exp().item() == pytest.approx(rest.item(), abs=2e-6)
    assert max(len(question["prompt"]) for question in server.questions) == min(batch_size, len(ROWS))


def test_all_of_the_vocabulary_is_the_dense_loss(model):
    row = ROWS[2]
    student = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor(row[1:])
    with serving(model, max_logprobs=VOCAB) as server:
        [answer] = connect(server, top_k=VOCAB).log_probs([row])
    assert answer.log_tail.tolist() == [-math.inf] * 5
    losses, _ = SparseTokenLoss(OBJECTIVES["amid"]())(student, labels, *answer)
    want, _ = DistillationTokenLoss(OBJECTIVES["amid"]())(student, in_memory(model, row).float(), labels)
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-6)


def likeliest_first(*log_p: float):
    """A tamper that gives these log-probabilities to the first tokens of every position, and the last to the rest."""

    def tamper(choices, prompts):
        for listed in (listed for choice in choices for listed in choice["prompt_logprobs"][1:]):
            for rank, entry in enumerate(listed.values()):
                entry["logprob"] = log_p[min(rank, len(log_p) - 1)]
        return choices

    return tamper


def test_a_sure_teacher_has_a_tail_that_makes_no_divergence_infinite(server):
    server.tamper = likeliest_first(-1e-9, -60.0)
    [answer] = connect(server).log_probs(ROWS[:1])
    assert answer.log_tail.tolist() == pytest.approx([-24 * math.log(2)] * 3)
    losses, _ = SparseTokenLoss(OBJECTIVES["rkl"]())(torch.zeros(3, VOCAB), torch.zeros(3, dtype=torch.long), *answer)
    assert losses.isfinite().all()


def test_a_token_that_the_teacher_excludes_is_listed_without_mass(server):
    server.tamper = likeliest_first(-0.1, -9999.0)
    [answer] = connect(server).log_probs(ROWS[:1])
    assert set((answer.log_p == EXCLUDED).sum(-1).tolist()) <= {7, 8}
    assert answer.log_tail.exp().tolist() == pytest.approx([1 - math.exp(-0.1)] * 3)


@pytest.mark.parametrize("fault", [HANG_UP, CUT_SHORT, 500, 502, 503, 504])
def test_a_server_that_fails_twice_is_asked_again(model, server, fault):
    teacher = connect(server)
    server.faults = [fault, fault]
    asked = len(server.questions)
    [answer] = teacher.log_probs(ROWS[:1])
    assert len(server.questions) - asked == 3
    [want] = teacher.log_probs(ROWS[:1])
    assert all(map(torch.equal, answer, want))


def test_a_server_that_keeps_failing_is_a_connection_error(model, server):
    teacher = connect(server, patience=0.2, backoff=0.01)
    server.faults = [503] * 100
    complaint = rf"{server.url}/v1/completions .* attempts.* silent for 0 s .*503.* checkpoint is intact"
    with pytest.raises(ConnectionError, match=complaint):
        teacher.log_probs(ROWS[:1])


def test_a_server_that_dies_in_the_middle_is_a_connection_error(model):
    with serving(model) as server:
        teacher = connect(server, batch_size=1, patience=0.2, backoff=0.05)

        def last(choices, prompts):
            server.faults = [HANG_UP] * 100
            return choices

        server.tamper = last
        with pytest.raises(ConnectionError, match="checkpoint is intact"):
            teacher.log_probs(ROWS[:1] * 20)
    with pytest.raises(ConnectionError, match=r"attempts, .*refused"):
        teacher.log_probs(ROWS)
    with pytest.raises(ConnectionError, match=rf"{server.url}/v1/models"):
        connect(server, patience=0.0)


def test_a_server_with_too_small_a_limit_is_refused_at_once_and_in_its_own_words(model):
    with (
        serving(model, max_logprobs=5) as server,
        pytest.raises(ValueError, match=r"refuses \(400\).* of 8, which is greater than max allowed: 5"),
    ):
        connect(server)


def test_a_server_without_prompt_logprobs_is_refused_at_once(model):
    with serving(model) as server, pytest.raises(ValueError, match="no prompt_logprobs"):
        server.choices = lambda prompts, k: [{"index": i, "text": ""} for i in range(len(prompts))]
        connect(server)


def shorten(choices):
    choices[1]["prompt_logprobs"].pop()


def swap(choices):
    choices[0], choices[1] = choices[1], choices[0]


def other_token(choices):
    listed = choices[1]["prompt_logprobs"][2]
    listed["77"] = listed.pop("8")


def nothing(choices):
    choices[1]["prompt_logprobs"][3] = None


def one_alone(choices):
    choices[1]["prompt_logprobs"][2] = {"8": {"logprob": -1.0}}


def value(x: float):
    def change(choices):
        next(iter(choices[1]["prompt_logprobs"][2].values()))["logprob"] = x

    return change


def too_likely(choices):
    for entry in choices[1]["prompt_logprobs"][2].values():
        entry["logprob"] = -0.5


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (shorten, "row 3: .* 5 tokens where the row has 6"),
        (swap, "row 2: .* 6 tokens where the row has 4"),
        (other_token, "row 3: .* at position 2 where the row has token 8"),
        (nothing, r"row 3: .* tokens \[\] at position 3"),
        (one_alone, "row 3: .* 1 tokens at position 2 where 8 were asked for"),
        (value(math.nan), "row 3: .* log-probabilities .*nan.* position 2"),
        (value(0.1), r"row 3: .* log-probabilities .*0\.1"),
        (too_likely, r"row 3: .* sum to [45]\."),
        (lambda choices: choices.pop(), "rows 2 to 3: .* answered 1 rows"),
    ],
)
def test_an_answer_that_is_not_the_rows_is_refused_with_its_index(model, server, change, complaint):
    def tamper(choices, prompts):
        if prompts[-1] == ROWS[2]:
            change(choices)
        return choices

    server.tamper = tamper
    with pytest.raises(ValueError, match=complaint):
        connect(server, batch_size=2).log_probs([ROWS[1], ROWS[3], ROWS[0], ROWS[2]])


@pytest.mark.parametrize("top_k", [6, 200])
def test_padding_among_the_likeliest_is_left_out_and_its_mass_shared_out(model, top_k):
    """The head has more rows than there are tokens, likely ones here."""
    vocabulary, rows = 200, [[5, 9, 150, 7], [8, 8, 8, 8, 8, 41]]
    with serving(model, max_logprobs=VOCAB) as server:
        teacher = connect(server, top_k=top_k, vocabulary=vocabulary)
        server_k = server.questions[-1]["prompt_logprobs"]
        answers = teacher.log_probs(rows)
    assert server_k == top_k
    for row, answer in zip(rows, answers, strict=True):
        whole = in_memory(model, row)
        left = 0
        for log_p, ids, values, log_tail in zip(whole, *answer, strict=True):
            likeliest = {row[1], *log_p.topk(top_k).indices.tolist()}
            padding = [token for token in likeliest if token >= vocabulary]
            listed = ids[values > -math.inf]
            assert max(listed.tolist()) < vocabulary and len(listed) >= top_k - len(padding)
            want = log_p[listed] - (1 - log_p[padding].exp().sum()).log()
            torch.testing.assert_close(values[values > -math.inf].double(), want, rtol=1e-5, atol=1e-5)
            assert values[values > -math.inf].exp().sum() + log_tail.exp() == pytest.approx(1.0, abs=1e-5)
            left += len(padding)
        assert left  # or this would test nothing


def test_where_all_are_listed_the_cut_is_that_of_a_head_in_memory(model):
    vocabulary, row = 200, ROWS[2]
    with serving(model, max_logprobs=VOCAB) as server:
        teacher = connect(server, top_k=vocabulary, vocabulary=vocabulary)
        teacher.top_k = VOCAB  # as if the server listed all that it has
        [answer] = teacher.log_probs([row])
    cut = in_memory(model, row)[:, :vocabulary].log_softmax(-1)
    for log_p, ids, values in zip(cut, answer.ids, answer.log_p, strict=True):
        listed = values > -math.inf
        assert len(set(ids[listed].tolist())) == vocabulary
        torch.testing.assert_close(values[listed].double(), log_p[ids[listed]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["top_k", "batch_size"])
def test_zero_is_refused(server, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        connect(server, **{name: 0})


def test_an_address_may_end_as_that_of_openai_clients(server):
    assert TeacherServer(f"{server.url}/v1/", 2, VOCAB).model == "tiny"


# ---- What it is asked about before the first step ----


def test_a_teacher_with_another_tokenizer_is_refused(model, caplog):
    ours, another = tiny_tokenizer(), tiny_tokenizer(vocab_size=300)
    with serving(model, tokenizer=ours) as server:
        connect(server).check(ours)
    assert not caplog.text
    with serving(model, tokenizer=another) as server, pytest.raises(ValueError, match="has another tokenizer"):
        connect(server).check(ours)


def test_a_server_that_does_not_tokenize_is_taken_at_its_word(model, caplog):
    with serving(model) as server:
        connect(server).check(tiny_tokenizer())
    assert "Whether the teacher has the student's tokenizer is not known" in caplog.text


def test_the_key_of_the_environment_is_sent(model, monkeypatch):
    with serving(model) as server:
        connect(server)
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        connect(server)
    assert server.keys == [None, "Bearer secret"]


def test_the_teacher_is_asked_at_temperature_one(model, server):
    connect(server).log_probs(ROWS)
    assert {question["temperature"] for question in server.questions} == {1.0}


def test_requests_are_repeated_later_and_later(model, monkeypatch):
    slept = []
    monkeypatch.setattr("amid_trl.teacher.connection.time.sleep", slept.append)
    with serving(model) as server:
        server.faults = [503, 503, 503]
        connect(server, backoff=0.25)
    assert slept == [0.0, 0.25, 0.5]  # the first repetition is at once


def test_an_answer_that_takes_too_long_is_no_answer(model):
    with serving(model) as server:
        teacher = connect(server, patience=0.0, timeout=0.2)
        server.tamper = lambda choices, prompts: time.sleep(1.0) or choices
        with pytest.raises(ConnectionError, match="in 1 attempts"):
            teacher.log_probs(ROWS)


def test_probabilities_that_sum_to_more_than_one_by_a_percent_are_refused(model, server):
    teacher = connect(server)

    def more(choices, prompts):
        listed = choices[0]["prompt_logprobs"][1]
        mass = sum(math.exp(entry["logprob"]) for entry in listed.values())
        for entry in listed.values():
            entry["logprob"] = min(0.0, entry["logprob"] + math.log(1.01 / mass))
        return choices

    server.tamper = more
    with pytest.raises(ValueError, match=r"probabilities that sum to 1\.01"):
        teacher.log_probs(ROWS)


def test_the_patience_counts_from_the_last_sign_of_life(model, caplog):
    """Longer than any single silence here, shorter than all of them together."""
    with serving(model) as server:
        teacher = connect(server, patience=1.5, backoff=0.1)
        started = time.monotonic()
        for _ in range(6):
            server.faults = [503] * 3  # 0.3 s of pauses
            teacher.log_probs(ROWS[:1])
        assert time.monotonic() - started > 1.5
    assert re.search(r"does not answer \(HTTP 503 .*\); it is asked again", caplog.text)


def test_a_server_that_is_still_starting_is_waited_for(model):
    with serving(model) as server:
        url = server.url
    waiting = []
    thread = threading.Thread(target=lambda: waiting.append(TeacherServer(url, 8, VOCAB, patience=60.0, backoff=0.05)))
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    with LogprobServer(model, port=server.server_port) as later:
        serves = threading.Thread(target=later.serve_forever, kwargs={"poll_interval": 0.01})
        serves.start()
        thread.join(timeout=60)
        later.shutdown()
        serves.join()
    assert waiting[0].model == "tiny"


def test_a_teacher_whose_answers_depend_on_their_company_is_reported(model, server, caplog):
    teacher = connect(server)
    teacher.check_company(tiny_tokenizer())
    assert not caplog.text
    assert [len(question["prompt"]) for question in server.questions[-2:]] == [1, 8]

    def rounded(choices, prompts):
        """As in bfloat16: another sum in another batch."""
        for listed in choices[0]["prompt_logprobs"][1:]:
            for entry in listed.values():
                entry["logprob"] -= 0.03 if len(prompts) > 1 else 0.0
        return choices

    server.tamper = rounded
    teacher.check_company(tiny_tokenizer())
    assert "depends on the rows beside it, by up to 0.03 nats" in caplog.text and "--dtype float32" in caplog.text


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        # One like llama.cpp's, which does not know prompt_logprobs.
        ({"choices": [{"text": "", "index": 0, "logprobs": None, "finish_reason": "length"}]}, "no prompt_logprobs"),
        ({"content": "", "tokens": []}, "answered 0 rows"),
        ({"choices": "none"}, "its completions have no choices"),
        (
            {"choices": [{"prompt_logprobs": [None, {"0": {"rank": 1}}]}]},
            r"row 0: .* are no prompt_logprobs: KeyError",
        ),
    ],
)
def test_a_server_of_another_kind_is_named(model, server, monkeypatch, answer, complaint):
    monkeypatch.setattr(
        TeacherServer,
        "_ask",
        lambda self, method, path, question=None: (
            {"data": [{"id": "llama", "owned_by": "llamacpp"}]} if method == "GET" else answer
        ),
    )
    with pytest.raises(ValueError, match=complaint):
        connect(server)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ({"models": []}, "it does not list its models"),
        ({"data": [["tiny"]]}, "it does not list its models"),
        ({"data": [{"id": "x", "max_model_len": "9"}]}, "a model whose id is 'x' and whose max_model_len '9'"),
    ],
)
def test_a_server_that_lists_no_models_is_named(server, monkeypatch, answer, complaint):
    monkeypatch.setattr(TeacherServer, "_ask", lambda self, *question: answer)
    with pytest.raises(ValueError, match=f"not a server of the kind that is needed, .*{complaint}"):
        connect(server)
