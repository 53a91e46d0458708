"""Packed plain text is the documents end to end, each read once a pass; its loss is torch's cross-entropy."""

import io
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from amid_trl.data.plain_text import PlainText
from amid_trl.maths.kernel import Finish
from amid_trl.maths.linear import Head, States, linear_token_loss
from amid_trl.maths.token_loss import cross_entropy


SIZE = 16


def texts(count: int, start: int = 0) -> list[str]:
    """Documents that tell their number and differ in length; some are empty of words."""
    return [f"{i}:" + " the river" * (i * 7 % 5) for i in range(start, start + count)]


def packed(documents: list[str], tokenizer, size: int = SIZE) -> list[list[int]]:
    """All full blocks, over lists."""
    ids = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]


def rows(texts):
    for text in texts:
        yield from rows(text) if isinstance(text, list) else [{"text": text}]


def stream(documents: list[str], shards: int = 1) -> IterableDataset:
    """Documents from a generator; with one shard, in order."""
    # A list in gen_kwargs has one shard for every entry, a tuple is one.
    texts = tuple(documents) if shards == 1 else [documents[i::shards] for i in range(shards)]
    return IterableDataset.from_generator(rows, gen_kwargs={"texts": texts})


def sharded_stream(documents: list[str], shards: int) -> IterableDataset:
    return Dataset.from_dict({"text": documents}).to_iterable_dataset(num_shards=shards)


def plain_text(dataset, tokenizer, **settings) -> PlainText:
    defaults = {"text_field": "text", "block_size": SIZE, "blocks": 1, "seed": 0, "rank": 0, "world_size": 1}
    return PlainText(dataset, tokenizer, **{**defaults, **settings})


def blocks(source: PlainText, count: int) -> list[list[int]]:
    return [batch[0].tolist() for batch in source.next_window(count)]


def documents(source: PlainText, count: int, tokenizer) -> list[str]:
    """The next `count` documents that the source packs, taken out of its blocks again."""
    ids: list[int] = []
    while ids.count(tokenizer.eos_token_id) < count:
        ids += blocks(source, 1)[0]
    found = []
    for _ in range(count):
        end = ids.index(tokenizer.eos_token_id)
        found.append(tokenizer.decode(ids[:end]))
        ids = ids[end + 1 :]
    return found


@pytest.mark.parametrize("size", [1, 5, SIZE, 60])
def test_blocks_are_the_documents_end_to_end_pass_after_pass(tokenizer, size):
    given = texts(12)
    want = packed(given * 4, tokenizer, size)
    got = blocks(plain_text(stream(given), tokenizer, block_size=size), len(want))
    assert got == want
    assert {len(block) for block in got} == {size}


def test_a_window_has_a_batch_of_blocks_for_every_micro_batch(tokenizer):
    given = texts(12)
    window = plain_text(stream(given), tokenizer, blocks=3).next_window(2)
    assert [(batch.shape, batch.dtype) for batch in window] == [((3, SIZE), torch.int64)] * 2
    assert torch.cat(window).tolist() == packed(given * 4, tokenizer)[:6]


def test_a_document_longer_than_blocks_is_cut_into_them_without_a_warning(tokenizer):
    given = [" the river" * 600, "end"]
    got = blocks(plain_text(stream(given), tokenizer), 100)
    assert not tokenizer.deprecation_warnings  # where it remembers what it has warned of
    assert got == packed(given * 4, tokenizer)[:100]


def test_an_eos_that_the_tokenizer_appends_itself_is_not_doubled(tokenizer):
    class Ending:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **settings):
            return {"input_ids": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]}

    given = texts(12)
    assert blocks(plain_text(stream(given), Ending()), 5) == packed(given, tokenizer)[:5]


@pytest.mark.parametrize("shards", [None, 4], ids=["dataset", "stream of 4 shards"])
def test_every_pass_has_all_documents_in_another_order(tokenizer, shards):
    given = texts(12)
    dataset = Dataset.from_dict({"text": given}) if shards is None else sharded_stream(given, shards)
    read = documents(plain_text(dataset, tokenizer), 60, tokenizer)
    passes = [read[i : i + 12] for i in range(0, 60, 12)]
    assert all(sorted(one) == sorted(given) for one in passes)
    assert len(set(map(tuple, passes))) > 3
    assert documents(plain_text(dataset, tokenizer), 60, tokenizer) == read
    assert documents(plain_text(dataset, tokenizer, seed=7), 60, tokenizer) != read


def test_a_dataset_is_shuffled_row_by_row_in_the_first_pass_too(tokenizer):
    given = texts(40)
    read = documents(plain_text(Dataset.from_dict({"text": given}), tokenizer), 40, tokenizer)
    numbers = [given.index(text) for text in read]
    assert sum(second == first + 1 for first, second in pairwise(numbers)) < 8


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_of_a_stream_take_documents_in_turn(tokenizer, world_size):
    given = texts(13)
    for rank in range(world_size):
        want = packed(given[rank::world_size] * 3, tokenizer)
        source = plain_text(stream(given), tokenizer, rank=rank, world_size=world_size)
        assert blocks(source, len(want)) == want


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("shards", [None, 1, 4], ids=["dataset", "stream", "stream of 4 shards"])
def test_processes_read_disjoint_documents_and_together_all_of_them(tokenizer, world_size, shards):
    given = texts(24)
    dataset = Dataset.from_dict({"text": given}) if shards is None else sharded_stream(given, shards)
    read = []
    for rank in range(world_size):
        source = plain_text(dataset, tokenizer, rank=rank, world_size=world_size)
        read += documents(source, 24 // world_size, tokenizer)
    assert sorted(read) == sorted(given)


def twice(batch):
    return {"text": batch["text"] * 2}


DOCUMENTS = texts(13)

# One of every kind whose position is saved in a way of its own.
KINDS = {
    "dataset": lambda: Dataset.from_dict({"text": DOCUMENTS, "number": range(13)}),
    "shards": lambda: sharded_stream(DOCUMENTS, 4),
    "generator": lambda: stream(DOCUMENTS),
    "generator of shards": lambda: stream(DOCUMENTS, shards=3),
    "mapped": lambda: sharded_stream(DOCUMENTS, 2).map(lambda row: {"text": row["text"] + "!"}),
    "mapped in batches": lambda: stream(DOCUMENTS).map(twice, batched=True, batch_size=3),
    "filtered": lambda: sharded_stream(DOCUMENTS, 3).filter(lambda row: len(row["text"]) > 4),
    "joined": lambda: concatenate_datasets([stream(DOCUMENTS[:5]), stream(DOCUMENTS[5:])]),
    "interleaved": lambda: interleave_datasets([stream(DOCUMENTS[:5]), stream(DOCUMENTS[5:])], [0.3, 0.7], seed=1),
    "cut": lambda: stream(DOCUMENTS).skip(1).take(11),
}


@pytest.mark.sampled(7)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_stream_goes_on_where_it_was_across_passes(tokenizer, kind, world_size):
    settings = {"rank": world_size - 1, "world_size": world_size, "blocks": 2}
    source, states, windows = plain_text(KINDS[kind](), tokenizer, **settings), [], []
    for _ in range(16):
        states.append(saved(source.state_dict()))
        windows.append(torch.cat(source.next_window(1)))
    assert states[-1]["plain_text"]["pass"] > 0
    for i, state in enumerate(states):
        resumed = plain_text(KINDS[kind](), tokenizer, **settings)
        resumed.resume([state] * world_size, world_size - 1, world_size)
        assert resumed.state_dict() == state
        assert torch.equal(torch.cat(resumed.next_window(len(windows) - i)), torch.cat(windows[i:]))


def saved(state: dict) -> dict:
    """A state as it comes out of a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_state_does_not_change_with_what_is_read_after_it(tokenizer):
    source = plain_text(stream(texts(12)), tokenizer)
    state = source.state_dict()
    before = saved(state)
    source.next_window(3)
    assert state == before != source.state_dict()


def test_with_another_number_of_processes_all_of_them_begin_the_next_pass(tokenizer):
    given = texts(12)
    dataset = Dataset.from_dict({"text": given})
    earlier = plain_text(dataset, tokenizer, world_size=3)
    earlier.next_window(1)
    read = []
    for rank in range(2):
        source = plain_text(dataset, tokenizer, rank=rank, world_size=2)
        source.resume([saved(earlier.state_dict())] * 3, rank, 2)
        assert source.state_dict()["plain_text"]["pass"] == 1
        read += documents(source, 6, tokenizer)
    assert sorted(read) == sorted(given)


class Counting:
    """A tokenizer that counts the documents and their tokens."""

    def __init__(self, tokenizer):
        self.tokenizer, self.eos_token_id, self.lengths = tokenizer, tokenizer.eos_token_id, []

    def __call__(self, text, **settings):
        ids = self.tokenizer(text, **settings)
        self.lengths.append(len(ids["input_ids"]) + 1)
        return ids


@pytest.mark.parametrize("streams", [False, True])
def test_no_document_is_tokenised_before_a_block_needs_it(tokenizer, streams):
    counting = Counting(tokenizer)
    dataset = stream(texts(500)) if streams else Dataset.from_dict({"text": texts(500)})
    source = plain_text(dataset, counting)
    for read in range(1, 20):
        source.next_window(1)
        assert sum(counting.lengths[:-1]) < read * SIZE <= sum(counting.lengths)


def test_no_row_of_a_stream_is_read_before_a_block_needs_it(tokenizer):
    read = []

    def counted():
        for row in rows(texts(500)):
            read.append(row)
            yield row

    counting = Counting(tokenizer)
    source = plain_text(IterableDataset.from_generator(counted), counting)
    source.next_window(5)
    assert len(read) <= len(counting.lengths) + 1  # the first row is looked at for its columns


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        (Dataset.from_dict({"text": []}), {}, "no rows"),
        (stream(["a"]).filter(lambda row: False), {}, "no rows"),
        (Dataset.from_dict({"body": ["a"], "id": [1]}), {}, "no column 'text'; it has 'body', 'id'"),
        (stream(["a"]), {"text_field": "body"}, "no column 'body'; it has 'text'"),
        (Dataset.from_dict({"text": [[1, 2]] * 50}), {}, r"'text' of the plain text must hold text; got \[1, 2\]"),
        (stream([None]), {}, "must hold text; got None"),
        (Dataset.from_dict({"text": texts(40)}).with_transform(lambda batch: batch), {}, "with_transform"),
        (stream(texts(12)), {"block_size": 1000}, "process 0 of 1 is shorter than one block of 1000"),
        (Dataset.from_dict({"text": texts(12)}), {"block_size": 1000}, "shorter than one block of 1000"),
        (Dataset.from_dict({"text": [" river" * 99] * 3}), {"rank": 3, "world_size": 4}, "size 3 into 4"),
        (stream([" river" * 99] * 3), {"rank": 3, "world_size": 4}, "no plain text for process 3 of 4"),
    ],
)
def test_text_that_cannot_fill_a_block_is_refused_at_once(tokenizer, dataset, settings, message):
    with pytest.raises(ValueError, match=message):
        plain_text(dataset, tokenizer, **settings)


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        plain_text(stream(texts(12)), tokenizer)


def test_a_block_may_be_all_the_text_there_is(tokenizer):
    [ids] = packed(["one two three"], tokenizer, len(tokenizer("one two three")["input_ids"]) + 1)
    source = plain_text(stream(["one two three"]), tokenizer, block_size=len(ids))
    assert blocks(source, 3) == [ids] * 3


def assert_is_dense(dtype: torch.dtype, chunk_size: int | None, finish: Finish) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(37, 8, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(37, (23,), generator=generator)
    states = States(hidden, Head(weight, finish=finish))
    total, figures = linear_token_loss(states, None, cross_entropy, (labels,), chunk_size)
    logits = finish(hidden.double() @ weight.double().T)
    want = F.cross_entropy(logits, labels, reduction="none")
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(figures, want.detach()[:, None].to(dtype), **tolerance)
    torch.testing.assert_close(total, want.sum().to(dtype), **tolerance)
    got = torch.autograd.grad(total * 3, (hidden, weight))
    for mine, theirs in zip(got, torch.autograd.grad(want.sum() * 3, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize("finish", [Finish(), Finish(0.5, 2.0)])
def test_the_linear_cross_entropy_is_the_dense_one_in_value_and_gradient(dtype, chunk_size, finish):
    assert_is_dense(dtype, chunk_size, finish)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # the compiler's own
def test_compiled_it_is_the_dense_one_too(compiling):
    assert_is_dense(torch.float32, 5, Finish())


def test_it_is_float32_of_narrower_logits():
    logits = torch.randn(5, 37, generator=torch.Generator().manual_seed(0)).bfloat16()
    losses, figures = cross_entropy(logits, torch.arange(5))
    assert losses.dtype == figures.dtype == torch.float32
    torch.testing.assert_close(losses, F.cross_entropy(logits.double(), torch.arange(5), reduction="none").float())
