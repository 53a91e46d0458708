"""The head of a served teacher is fetched once, kept under its hash, and checked whenever it is read."""

from dataclasses import replace

import pytest
import torch
from states_server import changing, hosting, wire
from tiny import tiny_llama

from amid_trl.teacher.connection import Connection
from amid_trl.teacher.head_files import kept_head


@pytest.fixture
def model(tokenizer):
    return tiny_llama(tokenizer, seed=3)


def head_requests(server) -> int:
    return sum("/head/" in path for path in server.questions)


def test_the_head_is_fetched_once_and_anew_if_it_is_damaged(model, tokenizer, heads, caplog):
    with hosting(model, tokenizer) as server:
        for _ in range(2):
            assert torch.equal(kept_head(server.about, Connection(server.url)).weight, model.lm_head.weight)
        assert head_requests(server) == 1
        [file] = heads.iterdir()
        assert file.name == f"{server.about.head}.safetensors"
        whole = file.read_bytes()
        for damaged in (whole[:-1], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]):
            file.write_bytes(damaged)
            caplog.clear()
            assert torch.equal(kept_head(server.about, Connection(server.url)).weight, model.lm_head.weight)
            assert f"{file} is damaged" in caplog.text and file.read_bytes() == whole
        assert head_requests(server) == 3 and list(heads.iterdir()) == [file]


def test_another_head_than_the_one_that_is_named_is_refused_and_not_kept(model, tokenizer, heads):
    def change(path, headers, body):
        return body[:-1] + bytes([body[-1] ^ 1]) if "/head/" in path else body

    complaint = r"names the head [0-9a-f]{64} and has sent [0-9a-f]{64}"
    with hosting(model, tokenizer, meddle=changing(change)) as server, pytest.raises(ValueError, match=complaint):
        kept_head(server.about, Connection(server.url))
    assert not list(heads.iterdir())


def test_a_head_of_another_shape_is_refused(model, tokenizer):
    with hosting(model, tokenizer) as server:
        line = Connection(server.url)
        with pytest.raises(ValueError, match=r"of shape \(350, 32\); its file has {'weight': \(360, 32\)}"):
            kept_head(replace(server.about, vocabulary=350), line)


def test_a_download_that_breaks_off_begins_again(tokenizer, heads):
    model = tiny_llama(tokenizer, seed=3, hidden_size=1024, intermediate_size=32, num_hidden_layers=1)
    with hosting(model, tokenizer) as server, wire(server.port) as line:
        line.breaks_at = 500_000  # of 1.5 MB
        head = kept_head(server.about, Connection(line.url, patience=20.0, backoff=0.05))
        assert head_requests(server) == 2
    assert torch.equal(head.weight, model.lm_head.weight) and len(list(heads.iterdir())) == 1
