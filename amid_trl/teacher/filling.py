"""A cache of hidden states that is filled while it is used: what it knows the teacher is not asked again."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from amid_trl.data.batches import Batch, row_key, trained_targets, unpadded_rows
from amid_trl.data.rows import UNTRAINED
from amid_trl.maths.linear import Head, States
from amid_trl.models.deepspeed import gathered_head
from amid_trl.models.tokenizers import tokenizer_fingerprint
from amid_trl.outputs import write_whole
from amid_trl.run import Run, Stateful
from amid_trl.teacher.cache import PROBE, CacheWriter, TeacherCache, kept_probe, loaded_as
from amid_trl.teacher.cache_about import StatesAbout
from amid_trl.teacher.fields import TeacherFields
from amid_trl.teacher.head_files import head_hash, packed_head, write_head


# Of so many tokens a folder keeps the hidden states. By how much of their norm another machine's float32 may differ;
# half precision by some of its roundings.
PROBE_TOKENS, PROBE_ROUNDING = 16, 5e-4


class StatesTeacher(Protocol):
    """A teacher (kinds.py) that answers with hidden states."""

    rows_at_once: int
    is_far: bool

    @property
    def name(self) -> str: ...

    @property
    def positions(self) -> int | None:
        """The longest row that it reads, in tokens; None without a bound."""
        ...

    @property
    def head(self) -> Head:
        """What makes logits of its answers, on the device."""
        ...

    def expect(self, batches: Sequence[Batch]) -> None: ...

    def __call__(self, batch: Batch) -> States: ...


def states_writer(run: Run[TeacherFields], folder: str, teacher: StatesTeacher) -> CacheWriter:
    """A writer of the teacher's hidden states, with its head beside them; all processes have to ask.

    By default they are kept in the dtype in which the head multiplies them. ValueError if the folder holds others.
    """
    args, accelerator = run.args, run.accelerator
    with accelerator.autocast(), gathered_head(teacher.head) as whole:
        kept = whole.cut(run.vocabulary).frozen()
    about = StatesAbout(
        teacher=teacher.name,
        revision=args.teacher_model_revision,
        tokenizer=tokenizer_fingerprint(run.tokenizer),
        vocabulary=run.vocabulary,
        dtype=cast(Any, args.teacher_cache_dtype or str(kept.weight.dtype).removeprefix("torch.")),
        head=head_hash(packed_head(kept)),
        logit_scale=kept.finish.scale,
        softcap=kept.finish.softcap,
        loaded_as=loaded_as(args),
        positions=teacher.positions,
    )
    writer = CacheWriter(folder, about, accelerator.process_index)
    write_head(kept, Path(folder))
    accelerator.wait_for_everyone()
    return writer


def check_same_teacher(run: Run[TeacherFields], folder: str, teacher: StatesTeacher) -> None:
    """Keep what the teacher answers to a few tokens; ValueError if one with other weights has filled the folder.

    A head says little: adapters and fine-tuned copies of one model share it. All processes have to ask.
    """
    file, dtype = Path(folder, PROBE), getattr(torch, TeacherCache(folder).about["dtype"])
    known = [token for token in range(1, run.vocabulary) if token not in run.renamed.names]
    ids = torch.tensor([known[:: max(1, len(known) // PROBE_TOKENS)][:PROBE_TOKENS]], device=run.accelerator.device)
    hidden = teacher({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}).hidden.to("cpu", dtype)
    if kept_probe(folder) is None and run.accelerator.is_main_process:
        write_whole(file, lambda beside: save_file({"hidden": hidden}, beside))
    run.accelerator.wait_for_everyone()
    kept = cast(Tensor, kept_probe(folder)).double()
    if kept.shape != hidden.shape:
        raise ValueError(f"{file} is damaged: it has {tuple(kept.shape)} numbers, not {tuple(hidden.shape)}")
    other = float((hidden.double() - kept).norm() / kept.norm())
    if not other <= max(PROBE_ROUNDING, 4 * torch.finfo(dtype).eps):
        raise ValueError(
            f"the cache {folder} was filled by a teacher with other weights than {teacher.name}: its hidden states of "
            f"a few tokens differ by {other:.1e} of their norm. Name another folder"
        )


def hidden_rows(states: States, batch: Batch) -> Iterator[Tensor]:
    """The hidden states of each row's trained tokens."""
    trained = (trained_targets(batch) != UNTRAINED).sum(-1).tolist()
    return iter(states.hidden.split(trained))


class FillingTeacher(TrainerCallback):
    """A teacher whose hidden states are kept in `teacher_cache`; its answers are what is kept there, in its dtype.

    So a row has one answer in all epochs, and in a run that is resumed. What one process has written the others find
    at the end of an epoch or of an evaluation.
    """

    is_sparse, asks_together = False, True

    def __init__(self, teacher: StatesTeacher, run: Run[TeacherFields]):
        self._teacher, self._accelerator, self._head = teacher, run.accelerator, teacher.head
        self.rows_at_once, self.is_far = teacher.rows_at_once, teacher.is_far
        self._run, self._folder, self._is_checked = run, str(run.args.teacher_cache), False
        self._writer = states_writer(run, self._folder, teacher)
        self._cache = TeacherCache(self._folder)

    @property
    def name(self) -> str:
        """The teacher's."""
        return self._teacher.name

    def state_dict(self) -> dict[str, Any]:
        """The teacher's."""
        return self._teacher.state_dict() if isinstance(self._teacher, Stateful) else {}

    def resume(self, states: Sequence[Mapping[str, Any]], rank: int, world: int) -> None:
        """As the teacher does."""
        if isinstance(self._teacher, Stateful):
            self._teacher.resume(states, rank, world)

    def expect(self, batches: Sequence[Batch]) -> None:
        """Hand on the micro-batches in which something is missing."""
        self._teacher.expect([batch for batch in batches if not self._knows(_keys(batch))])

    def __call__(self, batch: Batch) -> States:
        """The hidden states at the trained tokens; all processes have to ask, also about no row."""
        if not self._is_checked:
            check_same_teacher(self._run, self._folder, self._teacher)
            self._is_checked = True
        keys = _keys(batch)
        missing = torch.tensor(not self._knows(keys), device=self._accelerator.device, dtype=torch.long)
        everywhere: Any = self._accelerator.reduce(missing)
        if everywhere.item():  # a teacher that is sharded over the processes needs all of them
            for key, hidden in zip(keys, hidden_rows(self._teacher(batch), batch), strict=True):
                if key not in self._cache:  # another process's answer stays the one
                    self._writer.add(key, hidden)
            self._cache.refresh()  # the writer may have written
        rows = [waiting[0] if (waiting := self._writer.waiting(key)) else self._cache.row(key) for key in keys]
        if not rows:
            rows = [torch.empty(0, 0)]  # nobody multiplies it
        return States(torch.cat(cast(list[Tensor], rows)).to(batch["input_ids"].device), self._head)

    def _knows(self, keys: Sequence[bytes]) -> bool:
        def known() -> bool:
            return all(self._writer.waiting(key) is not None or key in self._cache for key in keys)

        if not (found := known()):
            self._cache.refresh()
            found = known()
        return found

    def write(self) -> None:
        """Write what waits, and wait for the other processes to have done so."""
        self._writer.flush()
        self._accelerator.wait_for_everyone()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """The next epoch has other rows for this process."""
        self.write()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As at the end of an epoch."""
        self.write()

    def on_predict(self, *args: Any, **kwargs: Any) -> None:
        """As after an evaluation."""
        self.write()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """What a checkpoint has been trained with is not lost with the run."""
        self.write()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """The rest."""
        self.write()


def _keys(batch: Batch) -> list[bytes]:
    return [row_key(*row) for row in unpadded_rows(batch)]
