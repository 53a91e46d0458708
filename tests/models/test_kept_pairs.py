"""What was found about two tokenizers is found once, and kept under the content of both."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_tokenizers import byte_fallback, other_order, special_behind, special_first

from amid_trl.models import paired_tokens
from amid_trl.models.retokenising import Retokeniser


@pytest.fixture
def found(monkeypatch, tmp_path) -> list[int]:
    """An entry for each time that a pair was not read; small vocabularies are kept too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("amid_trl.models.kept_pairs.KEPT_FROM", 0)
    find, times = paired_tokens._find, []

    def counting(*arguments):
        times.append(1)
        time.sleep(0.2)
        return find(*arguments)

    monkeypatch.setattr(paired_tokens, "_find", counting)
    return times


# With a space in front of a text, which one of these tokenizers alone writes, there are outcomes of two kinds.
BOTH = 2


def assert_equal(one: Retokeniser, two: Retokeniser) -> None:
    assert one.pairs.begun == two.pairs.begun and one.pairs.outcomes.rest == two.pairs.outcomes.rest
    for side in ("student", "teacher", "bytes"):
        torch.testing.assert_close(getattr(one.pairs.outcomes, side), getattr(two.pairs.outcomes, side))


def test_a_second_run_reads_it_and_one_of_another_tokenizer_does_not(found, tmp_path):
    first = Retokeniser(special_first(), byte_fallback())
    padded = byte_fallback()
    padded(["wet", "wet water"], padding=True, truncation=True, max_length=8)  # what a call leaves in the tokenizer
    assert_equal(first, Retokeniser(special_first(), padded))
    files = [*tmp_path.rglob("*.safetensors")]
    assert len(found) == len(files) == BOTH
    Retokeniser(special_behind(), byte_fallback())
    Retokeniser(special_first(), other_order())
    Retokeniser(byte_fallback(), special_first())
    assert len(found) == len([*tmp_path.rglob("*.safetensors")]) == 3 * BOTH + 1

    files[0].write_bytes(files[0].read_bytes()[:100])
    assert_equal(first, Retokeniser(special_first(), byte_fallback()))
    assert len(found) == 3 * BOTH + 2
    Retokeniser(special_first(), byte_fallback())
    assert len(found) == 3 * BOTH + 2


def test_of_two_at_a_time_one_finds_it(found):
    with ThreadPoolExecutor(2) as both:
        one, two = both.map(lambda _: Retokeniser(special_first(), byte_fallback()), range(2))
    assert len(found) == BOTH
    assert_equal(one, two)


def test_where_nothing_can_be_written_a_warning_says_so(found, tmp_path, caplog):
    (tmp_path / "amid_trl").write_text("a file in place of the folder")
    Retokeniser(special_first(), byte_fallback())
    assert len(found) == BOTH and "The pairs of two tokenizers are not kept" in caplog.text


def test_small_vocabularies_are_not_kept(found, monkeypatch, tmp_path):
    monkeypatch.setattr("amid_trl.models.kept_pairs.KEPT_FROM", 50_000)
    Retokeniser(special_first(), byte_fallback())
    assert not [*tmp_path.iterdir()]
