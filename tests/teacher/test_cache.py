"""What a cache gives back is what was written, by any number of runs; a cache of something else is refused by name."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_tokenizer

from amid_trl import OBJECTIVES
from amid_trl.data.batches import row_key
from amid_trl.maths.sparse import SparseTeacher, SparseTokenLoss, sparse_top_k
from amid_trl.maths.token_loss import DistillationTokenLoss
from amid_trl.models.tokenizers import tokenizer_fingerprint
from amid_trl.teacher.cache import CacheWriter, TeacherCache
from amid_trl.teacher.cache_about import CacheAbout


VOCAB, K = 50, 6
ABOUT = CacheAbout("teacher", None, "fingerprint", VOCAB, K)


def row(n: int) -> tuple[bytes, torch.Tensor]:
    """Row number n: its key, and the teacher's logits at its trained positions, 1 + n % 3 of them."""
    logits = 3 * torch.randn(1 + n % 3, VOCAB, generator=torch.Generator().manual_seed(n))
    return row_key([n, n + 1, 7], [-100, n + 1, 7]), logits


def write(folder, numbers, about=ABOUT, rank=0, k=K, rows_per_shard=4) -> None:
    with CacheWriter(folder, about, rank, rows_per_shard=rows_per_shard) as writer:
        for n in numbers:
            key, logits = row(n)
            writer.add(key, sparse_top_k(logits, k))


def files(folder) -> list[str]:
    return sorted(file.name for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2**-11)])
def test_rows_come_back_and_sum_to_one(tmp_path, dtype, tolerance):
    write(tmp_path, range(10), replace(ABOUT, dtype=dtype))
    cache = TeacherCache(tmp_path)
    assert len(cache) == 10
    for n in reversed(range(10)):
        key, logits = row(n)
        want, got = sparse_top_k(logits, K), cache.row(key)
        assert torch.equal(got.ids, want.ids) and got.ids.dtype == torch.int64
        assert got.log_p.dtype == got.log_tail.dtype == torch.float32
        torch.testing.assert_close(got.log_p, want.log_p, rtol=2 * tolerance, atol=2 * tolerance)
        torch.testing.assert_close(got.log_tail, want.log_tail, rtol=2 * tolerance, atol=2 * tolerance)
        torch.testing.assert_close(got.log_p.exp().sum(-1) + got.log_tail.exp(), torch.ones(len(logits)))


def test_all_of_the_vocabulary_in_float32_is_the_dense_loss(tmp_path):
    write(tmp_path, range(3), replace(ABOUT, top_k=VOCAB, dtype="float32"), k=VOCAB)
    cache = TeacherCache(tmp_path)
    for n in range(3):
        key, logits = row(n)
        student, labels = torch.randn(logits.shape, generator=torch.Generator().manual_seed(90 + n)), logits.argmax(-1)
        losses, _ = SparseTokenLoss(OBJECTIVES["amid"]())(student, labels, *cache.row(key))
        want, _ = DistillationTokenLoss(OBJECTIVES["amid"]())(student, logits, labels)
        torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-6)


def test_a_row_without_trained_tokens_is_a_row(tmp_path):
    empty = sparse_top_k(torch.zeros(0, VOCAB), K)
    with CacheWriter(tmp_path, ABOUT) as writer:
        for key, teacher in ((b"a" * 32, empty), (b"b" * 32, sparse_top_k(row(0)[1], K)), (b"c" * 32, empty)):
            writer.add(key, teacher)
    cache = TeacherCache(tmp_path)
    assert [tuple(cache.row(letter * 32).ids.shape) for letter in (b"a", b"b", b"c")] == [(0, K), (1, K), (0, K)]


def test_padding_stays_padding(tmp_path):
    key, teacher = (
        b"k" * 32,
        SparseTeacher(torch.tensor([[4, 0]]), torch.tensor([[-0.1, -math.inf]]), torch.tensor([-2.3522])),
    )
    with CacheWriter(tmp_path, ABOUT) as writer:
        writer.add(key, teacher)
    got = TeacherCache(tmp_path).row(key)
    assert got.log_p[0, 1] == -math.inf and got.log_p[0, 0].item() == pytest.approx(-0.1, rel=1e-3)


def test_half_precision_takes_six_bytes_for_a_token(tmp_path):
    tokens, k = 4000, 32
    teacher = SparseTeacher(torch.zeros(tokens, k).long(), torch.full((tokens, k), -4.0), torch.full((tokens,), -1.0))
    with CacheWriter(tmp_path, ABOUT) as writer:
        writer.add(b"k" * 32, teacher)
    assert (tmp_path / files(tmp_path)[0]).stat().st_size == pytest.approx(tokens * (6 * k + 4), rel=0.01)


def test_a_resumed_run_writes_what_is_missing_alone(tmp_path):
    keys = [row(n)[0] for n in range(10)]
    interrupted = CacheWriter(tmp_path, ABOUT, rows_per_shard=4)
    assert interrupted.missing(keys * 2) == keys
    for n in range(6):
        interrupted.add(keys[n], sparse_top_k(row(n)[1], K))
    assert interrupted.missing(keys) == keys[6:]
    del interrupted  # with two rows that are in no shard yet
    (tmp_path / "shard-0-00001.safetensors.0.partial").write_bytes(b"half of a shard")
    before = (tmp_path / "shard-0-00000.safetensors").stat().st_mtime_ns

    with CacheWriter(tmp_path, ABOUT, rows_per_shard=4) as writer:
        assert writer.missing(keys) == keys[4:]
        for n in range(10):
            writer.add(keys[n], sparse_top_k(row(n)[1], K))
    assert files(tmp_path) == [f"shard-0-0000{number}.safetensors" for number in range(3)]
    assert (tmp_path / "shard-0-00000.safetensors").stat().st_mtime_ns == before
    cache = TeacherCache(tmp_path)
    assert len(cache) == 10 and all(key in cache for key in keys)
    assert torch.equal(cache.row(keys[9]).ids, sparse_top_k(row(9)[1], K).ids)


def test_processes_write_shards_of_their_own_and_share_the_rows(tmp_path):
    write(tmp_path, range(0, 5), rank=0)
    write(tmp_path, range(3, 8), rank=1)  # rows 3 and 4 are known already
    write(tmp_path, range(8, 9), rank=10)
    assert files(tmp_path) == [
        *("shard-0-00000.safetensors", "shard-0-00001.safetensors"),
        *("shard-1-00000.safetensors", "shard-10-00000.safetensors"),
    ]
    cache = TeacherCache(tmp_path)
    assert len(cache) == 9
    for n in range(9):
        assert torch.equal(cache.row(row(n)[0]).ids, sparse_top_k(row(n)[1], K).ids)


def test_a_shard_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    def breaks_off(tensors, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("amid_trl.teacher.shards.save_file", breaks_off)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, range(2))
    assert files(tmp_path) == [] and len(TeacherCache(tmp_path)) == 0


def test_what_is_written_when_the_teacher_fails_stays(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), CacheWriter(tmp_path, ABOUT) as writer:
        writer.add(row(0)[0], sparse_top_k(row(0)[1], K))
        raise RuntimeError("out of memory")
    assert row(0)[0] in TeacherCache(tmp_path)


def test_two_runs_that_fill_one_folder_lose_nothing(tmp_path):
    first, second = CacheWriter(tmp_path, ABOUT), CacheWriter(tmp_path, ABOUT)
    for writer, numbers in ((first, range(3)), (second, range(3, 5))):
        for n in numbers:
            writer.add(row(n)[0], sparse_top_k(row(n)[1], K))
    first.flush()
    second.flush()
    cache = TeacherCache(tmp_path)
    assert len(cache) == 5 and all(row(n)[0] in cache for n in range(5))
    assert not [*tmp_path.glob(".*")]


def test_a_shard_is_written_when_it_is_large_too(tmp_path, monkeypatch):
    monkeypatch.setattr("amid_trl.teacher.shards.PENDING", 1)
    write(tmp_path, range(3), rows_per_shard=1000)
    assert len(list(tmp_path.glob("shard-*"))) == 3


def test_a_damaged_shard_is_no_shorter_cache(tmp_path):
    write(tmp_path, range(4))
    file = tmp_path / files(tmp_path)[0]
    file.write_bytes(file.read_bytes()[:-10])
    for opened in (lambda: TeacherCache(tmp_path), lambda: CacheWriter(tmp_path, ABOUT)):
        with pytest.raises(ValueError, match=f"{file} is damaged .*incomplete metadata.*: delete it, and its rows"):
            opened()


def test_the_key_is_the_tokens_and_which_are_trained():
    ids, labels = [5, 6, 7, 8], [-100, -100, 7, 8]
    key = row_key(ids, labels)
    assert len(key) == 32
    assert key == row_key(torch.tensor(ids), torch.tensor(labels, dtype=torch.int32))
    assert key == row_key(ids, [5, -100, 7, 8]), "nothing predicts the first token"
    others = [
        row_key([5, 6, 7, 9], [-100, -100, 7, 9]),
        row_key(ids, [-100, 6, 7, 8]),
        row_key(ids, [-100, -100, 7, -100]),
        row_key(ids[:3], labels[:3]),
        row_key([*ids, 0], [*labels, -100]),
    ]
    assert len({key, *others}) == 6


def test_an_unknown_row_is_named(tmp_path):
    write(tmp_path, range(2))
    key = row(5)[0]
    with pytest.raises(ValueError, match=f"no row {key.hex()}"):
        TeacherCache(tmp_path).row(key)


@pytest.mark.parametrize("name", ["teacher", "revision", "tokenizer", "vocabulary", "top_k", "dtype", "format"])
def test_a_folder_about_something_else_is_not_written_to(tmp_path, name):
    write(tmp_path, range(2))
    other = replace(ABOUT, **{name: "float32" if name == "dtype" else 77})
    with pytest.raises(ValueError, match=f"was written with {name} .*, not "):
        CacheWriter(tmp_path, other)


def test_a_cache_of_another_teacher_tokenizer_vocabulary_or_k_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    about = replace(ABOUT, tokenizer=tokenizer_fingerprint(tokenizer))
    write(tmp_path, range(2), about)
    cache = TeacherCache(tmp_path)
    cache.check(tokenizer, "teacher", None, VOCAB, K)
    cache.check(tiny_tokenizer(), None, "any", VOCAB, K)
    with pytest.raises(ValueError, match=r"teacher 'teacher', not 'another'$"):
        cache.check(tokenizer, "another", None, VOCAB, K)
    with pytest.raises(ValueError, match=r"revision None, not 'v2'$"):
        cache.check(tokenizer, "teacher", "v2", VOCAB, K)
    with pytest.raises(ValueError, match=f"vocabulary {VOCAB}, not 51$"):
        cache.check(tokenizer, None, None, 51, K)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(
        ValueError, match=r"with tokenizer '[0-9a-f]{64}', not .*; vocabulary 50, not 51; top_k 6, not 7$"
    ):
        cache.check(tokenizer, "teacher", None, 51, 7)


def test_what_is_no_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no teacher\.json"):
        TeacherCache(tmp_path / "nowhere")
    write(tmp_path, range(2))
    about = json.loads((tmp_path / "teacher.json").read_text())
    (tmp_path / "teacher.json").write_text(json.dumps({**about, "format": 3}))
    with pytest.raises(ValueError, match=r"format 3, not one of \[1, 2\]"):
        TeacherCache(tmp_path)
