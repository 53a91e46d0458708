"""The teachers of a run: loaded where they are names, checked against the student, and placed."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from amid_trl.data.known_tokens import KnownTokens
from amid_trl.data.row_teachers import SINGLE
from amid_trl.data.rows import tokenizer_name
from amid_trl.fields import json_dict
from amid_trl.models.gguf import warn_of_gguf
from amid_trl.models.heads import causal_lm
from amid_trl.models.loading import load_tokenizer, named_tokenizer
from amid_trl.models.pairs import check_text_only, common_positions, common_vocabulary, freeze, own_vocabulary
from amid_trl.models.spelling import token_bytes
from amid_trl.models.tokenizers import OtherTokenizer, renamed_tokens
from amid_trl.run import RenamedTokens, Run
from amid_trl.teacher.cache import TeacherCache, cache_to_fill, whole_cache
from amid_trl.teacher.loading import load_teacher
from amid_trl.teacher.placement import place
from amid_trl.training.config import AMiDConfig
from amid_trl.training.named_teachers import naming_teacher


logger = logging.getLogger(__name__)

TeacherModel = str | nn.Module | None


class LoadedTeacher(NamedTuple):
    """A teacher's settings, and its model if it has one here.

    Attributes:
        renamed: tokens that mean another thing to it than to the student.
        positions: the longest sequence that it has positions for; None if it declares no bound.
        awaits_data: whether the model is None because its cache may know all rows, which only the data shows.
        tokenizer: its own, where it is another one than the student's.
    """

    args: AMiDConfig
    model: nn.Module | None
    renamed: RenamedTokens
    positions: int | None = None
    awaits_data: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def known(self) -> KnownTokens | None:
        """The tokens that it knows of a tokenizer of its own; None where that is the student's."""
        if self.model is None or self.tokenizer is None:
            return None
        return KnownTokens(self.tokenizer, own_vocabulary(self.model, self.tokenizer), "teacher")

    def vocabulary(self, student: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """How many tokens the student as it is trained knows, and the teacher, if they are the same for it."""
        return common_vocabulary(student, self.model if self.known is None else None, tokenizer)


def given_model(model: TeacherModel, args: AMiDConfig) -> TeacherModel:
    """The teacher's model or its name, None where something else stands for it; a ValueError for both or none."""
    absent = args.absent_teacher
    if model is not None and absent:
        raise ValueError(f"the teacher is given twice: as teacher_model and as {absent}")
    model = model if model is not None else args.teacher_model_name_or_path
    if model is None and not absent:
        raise ValueError(
            "teacher_model (or args.teacher_model_name_or_path) is missing: pass a name, a path or a model"
        )
    return None if absent else model


def open_model(
    model: TeacherModel, args: AMiDConfig, student: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> LoadedTeacher:
    """The teacher, loaded unless something stands for it, or its cache may know all rows."""
    cache = cache_to_fill(args)
    read = TeacherCache(str(args.teacher_cache)) if args.reads_cache else cache
    positions = None if read is None else read.about.get("positions")
    if model is None or (cache is not None and isinstance(model, str)):
        return LoadedTeacher(args, None, RenamedTokens(), positions, awaits_data=model is not None)
    loaded, renamed, other = load_checked_teacher(model, args, student, tokenizer)
    if other is not None:  # what it reads is counted in its own tokens
        return LoadedTeacher(args, loaded, renamed, tokenizer=other)
    bounds = [bound for bound in (common_positions(loaded), positions) if bound is not None]
    return LoadedTeacher(args, loaded, renamed, min(bounds, default=None))


def load_checked_teacher(
    teacher_model: str | nn.Module, args: AMiDConfig, student: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> tuple[nn.Module, RenamedTokens, PreTrainedTokenizerBase | None]:
    """A teacher with a model of its own, the tokens that mean another thing to it, its tokenizer if it is another."""
    teacher = load_teacher(teacher_model, args)
    file = json_dict(args.teacher_model_init_kwargs).get("gguf_file")
    revision, remote = args.teacher_model_revision, {"trust_remote_code": args.trust_remote_code}
    check_teacher(student, teacher)
    named = args.teacher_tokenizer_name_or_path
    if named is not None and named != teacher_model:
        teacher_tokenizer = named_tokenizer("teacher_tokenizer_name_or_path", named, **remote)
    else:
        teacher_tokenizer = load_tokenizer(teacher, teacher_model, gguf_file=file, revision=revision, **remote)
    if teacher_tokenizer is not None:
        warn_of_gguf(tokenizer, teacher_tokenizer)
    writes = args.generates or args.eval_generate
    try:
        return teacher, renamed_tokens(tokenizer, teacher_tokenizer, writes=writes), None
    except OtherTokenizer as error:
        other = cast(PreTrainedTokenizerBase, teacher_tokenizer)  # None is no other
        check_other_tokenizer(args, other, error)
        for each in (tokenizer, other):
            token_bytes(each)  # one that cannot be read is refused before any text is
        logger.warning(
            "The teacher has another tokenizer (%s) than the student (%s): it reads the text in its own tokens, and "
            "both are compared on what they have in common (docs/teacher.md).",
            *map(tokenizer_name, (other, tokenizer)),
        )
        return teacher, RenamedTokens(), other


def check_other_tokenizer(args: AMiDConfig, other: PreTrainedTokenizerBase, error: OtherTokenizer) -> None:
    """Refuse what needs the teacher's answers in the student's tokens, or a chat template of its own."""
    needs = {
        "teacher_cache": args.teacher_cache is not None,
        "seq_kd": args.seq_kd,
        "distill_temperature": args.distill_temperature != 1.0,
        "token_selection": args.token_selection is not None,
    }
    for name, asked in needs.items():
        if asked:
            raise OtherTokenizer(
                f"{name}={getattr(args, name)!r} needs a teacher with the student's tokenizer: {error}"
            )
    if (told := args.teacher_chat_template_kwargs) and not other.chat_template:
        raise ValueError(
            f"teacher_chat_template_kwargs={told!r} has no effect: the teacher's tokenizer {tokenizer_name(other)} "
            "has no chat template"
        )


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that the loss could not read, or that would change with the student."""
    check_text_only(teacher, "teacher")
    if causal_lm(teacher).base_model is causal_lm(student).base_model:
        raise ValueError("teacher_model is the student itself and would change with it; pass a copy or a name")


class RunTeacher(NamedTuple):
    """A teacher's record of the run, with its own settings, and its model where that lies during the run."""

    run: Run[AMiDConfig]
    model: nn.Module | None


def placed_teachers(
    loaded: Mapping[str, LoadedTeacher], run: Run[AMiDConfig], student: nn.Module, datasets: Mapping[str, Any]
) -> tuple[dict[str, RunTeacher], Run[AMiDConfig]]:
    """The teachers as they lie during the run, and the run with the tokens that mean another thing to any of them.

    It has the tokenizer of the teacher of all rows too, where that is another one. A teacher that turns out to be
    needed for the prepared datasets is loaded now.
    """
    placed = {}
    for name, teacher in loaded.items():
        own = dataclasses.replace(
            run, args=teacher.args, renamed=teacher.renamed, teacher=name, teacher_tokenizer=teacher.tokenizer
        )
        with naming_teacher(name):
            model = teacher.model
            if teacher.awaits_data and whole_cache(own, datasets) is None:
                model, renamed, _ = load_checked_teacher(
                    str(own.args.teacher_model_name_or_path), own.args, student, run.tokenizer
                )
                common_vocabulary(student, model, run.tokenizer)
                for dataset in datasets.values():
                    renamed.checked(dataset)
                own = dataclasses.replace(own, renamed=renamed)
            placed[name] = RunTeacher(own, None if model is None else place(freeze(model), own.args, run.accelerator))
    renamed = RenamedTokens.joined(teacher.run.renamed for teacher in placed.values())
    other = loaded[SINGLE].tokenizer if SINGLE in loaded else None
    return placed, dataclasses.replace(run, renamed=renamed, teacher_tokenizer=other)
