"""What stands behind a token decides how it is written: runs of spaces, above all. The row shows what it was."""

import pytest
from certain_models import disagreements
from small_tokenizers import BPE, CODE, SPECIAL, TEXTS, byte_level, lossy, wrapped
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from amid_trl.models.paired_tokens import paired_tokens
from amid_trl.models.retokenising import Retokeniser
from amid_trl.models.spelled import Spelled


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
LETTERS = sorted({*"".join(CODE)} - {" ", "\n", "\t"})
SIZES = {2: 1, 4: 2, 8: 4, 3: 2, 5: 4, 6: 4, 7: 4}  # of a run the size of its first part, in the order of the merges


def runs(space: str, longest: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens of 2 to `longest` spaces and merges that make them."""
    merges = [(space * first, space * (size - first)) for size, first in SIZES.items() if size <= longest]
    return [left + right for left, right in merges], merges


def leaves_one() -> Tokenizer:
    """As GPT-2's, and others' of bytes: of a run of spaces the last one is the next word's."""
    tokens, merges = runs("Ġ", 8)
    words = [("Ġ", letter) for letter in "abcdeirx"]
    vocabulary = [*ALPHABET, *tokens, *(left + right for left, right in words)]
    return byte_level(models.BPE({token: i for i, token in enumerate(vocabulary)}, [*merges, *words]))


def takes_all(*words: tuple[str, str]) -> Tokenizer:
    """As SentencePiece's: merges alone decide, and bytes stand for what is no letter."""
    tokens, merges = runs("▁", 4)
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, *tokens]
    pieces += [left + right for left, right in words]
    model = models.BPE(
        {token: i for i, token in enumerate(pieces)},
        [*words, *merges],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


BUILT = {
    "leaves one": leaves_one,
    "takes all": takes_all,
    "takes all but before some words": lambda: takes_all(("▁", "r"), ("▁", "i")),
}


def ids(tokenizer, text: str) -> list[int]:
    return [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("teacher", BUILT)
@pytest.mark.parametrize("student", BUILT)
def test_two_that_are_certain_of_a_text_agree_at_every_token(student, teacher):
    ours, theirs = (wrapped(BUILT[name](), SPECIAL) for name in (student, teacher))
    pair = Retokeniser(ours, theirs)
    compared = trained = 0
    for text in CODE:
        row = ids(ours, text)
        found = disagreements(pair, row)
        wrong = {ours.decode(row[max(0, i - 2) : i + 1]): kl for i, kl in found.items() if not kl < 0.01}
        assert not wrong
        compared, trained = compared + len(found), trained + len(row) - 1
    assert compared == trained if student == teacher else compared > 0.75 * trained


@pytest.mark.parametrize("student", BPE)
@pytest.mark.parametrize("teacher", [*BPE, "lossy"])
def test_they_agree_in_any_language(student, teacher):
    ours, theirs = BPE[student](), {**BPE, "lossy": lossy}[teacher]()
    pair = Retokeniser(ours, theirs)
    for text in (*TEXTS, *CODE):
        row = ids(ours, text)
        assert {i: kl for i, kl in disagreements(pair, row).items() if not kl < 0.01} == {}


def test_of_a_run_of_spaces_the_outcome_is_what_both_write_there():
    student, teacher = (Spelled(wrapped(build(), SPECIAL)) for build in (leaves_one, takes_all))
    outcomes = paired_tokens(student, teacher).outcomes
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()

    def of(students: str, teachers: str) -> tuple[int, int]:
        return int(outcomes.student[ours[students]]), int(outcomes.teacher[theirs[teachers]])

    for size in (2, 3):
        together = of("Ġ" * size, "▁" * (size + 1))
        assert together[0] == together[1] != outcomes.rest
    apart = of("ĠĠĠ", "▁▁▁")
    assert apart[0] != apart[1]
