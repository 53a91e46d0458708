"""Whether student and teacher mean the same by the ids of tokens."""

import hashlib
import json
import logging
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from amid_trl.data.rows import tokenizer_name
from amid_trl.run import RenamedTokens


logger = logging.getLogger(__name__)


class OtherTokenizer(ValueError):
    """Student and teacher do not have the same tokenizer."""


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary: which text has which id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def renamed_tokens(
    tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase | None, *, writes: bool = True
) -> RenamedTokens:
    """The added tokens (special ones) that have another name or another id for the teacher; a warning names them.

    Tokens added on one side only (a padding token, chat markers) are legal, and a warning names them too. An
    OtherTokenizer if any other token has another id or is known on one side only, or, in a run that `writes` text,
    the EOS has another name: its distribution would be read wrongly.
    """
    if teacher_tokenizer is None:
        return RenamedTokens()
    student_ids, teacher_ids = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    student_tokens, teacher_tokens = ({i: token for token, i in ids.items()} for ids in (student_ids, teacher_ids))
    moved = [
        token
        for token, i in student_ids.items()
        if teacher_ids.get(token, i) != i or teacher_tokens.get(i, token) != token
    ]
    ids = {place[token] for token in moved for place in (student_ids, teacher_ids) if token in place}
    names = {i: (student_tokens.get(i), teacher_tokens.get(i)) for i in ids}
    missing = [token for token in student_ids if token not in teacher_ids and student_ids[token] not in names]
    added, teacher_added = _added(tokenizer), _added(teacher_tokenizer)
    foreign = [
        str(ours if ours is not None else theirs)
        for i, (ours, theirs) in names.items()
        if (writes and i == tokenizer.eos_token_id) or {ours} - {None, *added} or {theirs} - {None, *teacher_added}
    ]
    foreign += [token for token in missing if token not in added]
    known = {*student_ids, *teacher_added}
    lacked = [token for token, i in teacher_ids.items() if token not in known and i not in names]
    foreign += lacked
    if foreign:
        example = foreign[0]
        files = map(tokenizer_name, (tokenizer, teacher_tokenizer))
        places = f"{student_ids.get(example)} and {teacher_ids.get(example)}"
        raise OtherTokenizer(
            f"student and teacher need the same tokenizer; {' and '.join(files)} differ in "
            f"{len(moved) + len(missing) + len(lacked)} tokens (for instance {example!r}: id {places}). AMiDTrainer "
            "trains with a teacher of another tokenizer that is in memory."
        )
    renamed = RenamedTokens(names)
    if names:
        logger.warning(
            "Student and teacher have other names for %s tokens, which no text may have: %s",
            len(names),
            renamed.shown(renamed.ids[:8]),
        )
    if missing:
        logger.warning("The teacher's tokenizer does not know %s; its probability for them is untrained.", missing)
    return renamed


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    with_added: Any = tokenizer  # the base class of all tokenizers does not have it
    return cast(dict[str, int], with_added.get_added_vocab())
