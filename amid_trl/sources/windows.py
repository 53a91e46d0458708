"""The text of a window that the dataset did not write: from the student, the teacher or the replay buffer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from amid_trl.data.batches import Batch, PromptTokens, completion_batch, deal_rows, several_each, window_prompts
from amid_trl.data.plain_text import PlainText
from amid_trl.maths.balance import Routing, balance_loss, routing
from amid_trl.maths.means import Means
from amid_trl.models.generation import are_clipped
from amid_trl.phases import count_written, phase
from amid_trl.run import Run
from amid_trl.sources.completion_table import CompletionLog
from amid_trl.sources.fields import SourceFields
from amid_trl.sources.shares import WindowSources
from amid_trl.sources.source import DATASET_TEXT, Source
from amid_trl.sources.writers import Writer


# What the logs say of the windows, beside the figures of the tokens.
WINDOW_MEANS = (
    "on_policy_share",
    "replay_share",
    "completions/mean_length",
    "completions/clipped_ratio",
    "pretrain_nll",
)


@dataclass(frozen=True)
class Balance:
    """The load-balancing loss of a window: `weight` · the sum of what its micro-batches contribute.

    `whole` is the routing of the window on all processes, None where it has one micro-batch alone, and `share` 1 / the
    number of them.
    """

    top_k: int
    weight: float
    whole: Routing | None
    share: float

    def __call__(self, router_logits: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """What a micro-batch contributes."""
        return balance_loss(routing(router_logits, mask, self.top_k), self.whole)


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step, and what holds for all of them.

    A batch holds tensors alone, `plain_text` among them where there is any; the mean cross-entropy of each of these
    counts `plain_weight`. `source` has written the completions; None: there is no window, as in an evaluation.
    `balance` is there if the experts of a mixture are to be balanced.
    """

    source: Source | None = None
    batches: list[Batch] = field(default_factory=list)
    plain_weight: float = 0.0
    balance: Balance | None = None


class Windows:
    """Lets each window's source write its completions, and counts what was written."""

    def __init__(
        self,
        run: Run[SourceFields],
        writers: Mapping[Source, Writer],
        sources: WindowSources,
        plain_text: PlainText | None,
        means: Means,
        *,
        deals: bool,
    ):
        """With `deals`, as for our own collator, the rows of a window are dealt by teacher and length.

        Without padding a single teacher's are dealt in micro-batches of like size; packed rows stay as they are.
        """
        args = run.args
        self._num_generations = args.num_generations
        self._writers, self._sources, self._plain_text, self._means = writers, sources, plain_text, means
        self._pad: Any = (run.tokenizer.pad_token_id, args.pad_to_multiple_of)
        self._deals, self._padding_free = deals and not args.packing, args.padding_free
        log = CompletionLog(str(args.output_dir), run.tokenizer, args.num_completions_to_print)
        self._log = log if args.log_completions else None

    def window(self, batches: list[Batch], step: int, steps: int, to_device: Callable[[Batch], Batch]) -> Window:
        """Window `step` of `steps`, from the dataset's batches; all processes have to ask."""
        source = self._sources.choose(step, steps)
        if source not in DATASET_TEXT and batches:
            batches = [to_device(batch) for batch in self.written_by(source, batches, step)]
        if self._deals:
            batches = deal_rows(batches, *self._pad, evenly=self._padding_free)
        for name, share in self._sources.shares(source).items():
            self._means.add(name, share, 1)
        if self._plain_text is None or not batches:
            return Window(source, batches)
        device = batches[0]["input_ids"].device
        texts = self._plain_text.next_window(len(batches))
        batches = [{**batch, "plain_text": blocks.to(device)} for batch, blocks in zip(batches, texts, strict=True)]
        return Window(source, batches, self._plain_text.weight / len(batches))

    def written_by(self, source: Source, batches: list[Batch], step: int) -> list[Batch]:
        """The window's prompts, or those that are replayed, with completions from `source`; on the CPU."""
        if source == "replay":
            prompts, completions = self._sources.replayed(sum(len(batch["input_ids"]) for batch in batches))
        else:
            prompts = window_prompts(batches, writer=source)
            if source == "student":
                prompts = several_each(prompts, self._num_generations)
            read = [prompt.read_by(source == "teacher") for prompt in prompts]
            with phase("writing"):
                completions = self._writers[source](read, step)
            self._record(source, prompts, completions)
        if source == "student":
            self._sources.remember(prompts, completions)
        window, start = [], 0
        for batch in batches:
            rows = slice(start, start := start + len(batch["input_ids"]))
            window.append(completion_batch(prompts[rows], completions[rows], *self._pad))
        return window

    def _record(self, source: Source, prompts: list[PromptTokens], completions: list[Tensor]) -> None:
        count_written(sum(map(len, completions)))
        clipped = are_clipped(completions, self._writers[source].config)
        self._means.add("completions/mean_length", sum(map(len, completions)), len(completions))
        self._means.add("completions/clipped_ratio", sum(clipped), len(completions))
        if self._log is not None:
            self._log.remember(source, [prompt.ids for prompt in prompts], completions)

    def write_table(self, step: int) -> dict[str, list]:
        """Print and save the table of completions, if one is wanted and there is a new one: its columns."""
        return {} if self._log is None else self._log.write(step)
