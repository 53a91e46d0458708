"""How windows are shared out to the sources, and the state of that: DistiLLM's rule, the replay buffer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amid_trl.data.batches import PromptTokens
from amid_trl.data.rows import tokenizer_name
from amid_trl.fields import build_schedule
from amid_trl.maths.schedules import AdaptiveShare
from amid_trl.models.tokenizers import tokenizer_fingerprint
from amid_trl.run import Run
from amid_trl.sources.fields import SourceFields
from amid_trl.sources.replay import ReplayBuffer, deal
from amid_trl.sources.source import DATASET_TEXT, FRESH_PARTS, Source, next_source, replay_seed, window_draw


# In a checkpoint: the teacher's tokenizer, if it is another than the student's; prompts that are replayed are in it.
READ_IN = "replay_read_in"


class WindowSources:
    """The sources of one process, which are those of all processes: only what is in its replay buffer is its own."""

    def __init__(self, run: Run[SourceFields]):
        self._config, self._accelerator = run.args, run.accelerator
        config, accelerator = run.args, run.accelerator
        self._schedule = build_schedule(config, "lmbda")
        self._lmbda = self._schedule(0.0)
        self._adaptive: AdaptiveShare | None = None
        if config.sampling == "adaptive":
            self._adaptive = AdaptiveShare(config.adaptive_threshold, config.adaptive_tolerance, config.adaptive_step)
            self._replay = ReplayBuffer(config.replay_capacity, replay_seed(config.seed, accelerator.process_index))
            self._read_in = _tokens_of(run.teacher_tokenizer)

    def choose(self, step: int, steps: int) -> Source:
        """The source of window `step` of `steps`; all processes have to ask."""
        if self._adaptive is None:
            self._lmbda = self._schedule(step / steps)
            return self._by_share(step, self._lmbda)
        return next_source(
            window_draw(self._config.seed, step, self._config.sampling_block_size),
            lmbda=self._adaptive.threshold,
            seq_kd=self._config.seq_kd,
            fresh_part=FRESH_PARTS[self._config.replay_share]((step + 1) / steps),  # DistiLLM counts this window too
            buffer_full=self._full_everywhere(),
        )

    def _by_share(self, step: int, lmbda: float) -> Source:
        u = window_draw(self._config.seed, step, self._config.sampling_block_size)
        return next_source(u, lmbda=lmbda, seq_kd=self._config.seq_kd)

    def will_read_dataset(self, step: int, steps: int) -> bool:
        """Whether it is known beforehand that window `step` has the dataset's text; an adaptive share may move."""
        known = self._adaptive is None and step < steps
        return known and self._by_share(step, self._schedule(step / steps)) in DATASET_TEXT

    def _full_everywhere(self) -> bool:
        full = torch.tensor(float(self._replay.full), device=self._accelerator.device)
        share: Any = self._accelerator.reduce(full, reduction="mean")
        return share.item() == 1

    def remember(self, prompts: Sequence[PromptTokens], completions: Sequence[Tensor]) -> None:
        """Keep what the student has just written, if it may be replayed."""
        if self._adaptive is not None:
            self._replay.add(prompts, completions)

    def replayed(self, rows: int) -> tuple[list[PromptTokens], list[Tensor]]:
        """Prompts and completions of earlier windows."""
        return self._replay.sample(rows)

    @property
    def mixes(self) -> bool:
        """Whether windows of this run have different sources."""
        shares = self._config.student_shares
        return self._adaptive is not None or (shares.most > 0 and shares.least < 1)

    @property
    def needs_evaluation(self) -> bool:
        """Whether the first window has to wait for the loss of the untrained student."""
        return self._adaptive is not None and not self._adaptive.has_reference

    def follow(self, metrics: Mapping[str, float]) -> None:
        """Take note of an evaluation during training."""
        if self._adaptive is not None:
            self._adaptive.update(metrics["eval_nll"])

    def shares(self, source: Source) -> dict[str, bool]:
        """What a window of `source` adds to the logged shares."""
        shares = {"on_policy_share": source == "student"}
        return shares if self._adaptive is None else {**shares, "replay_share": source == "replay"}

    @property
    def figures(self) -> dict[str, float]:
        """For the logs: the numbers that move."""
        if self._adaptive is not None:
            return {"adaptive_threshold": self._adaptive.threshold}
        return {"lmbda": self._lmbda} if self._schedule.moves else {}

    def state_dict(self) -> dict[str, Any]:
        """Empty unless the share is adaptive."""
        if self._adaptive is None:
            return {}
        read_in = {READ_IN: self._read_in} if self._read_in else {}
        return {"adaptive": self._adaptive.state_dict(), "replay": self._replay.state_dict(), **read_in}

    def resume(self, states: Sequence[Mapping[str, Any]], rank: int, world: int) -> None:
        """Go on from where another run was; the replay rows of other processes than before are dealt anew.

        ValueError where prompts of the teacher's own among them are in tokens of another tokenizer than its.
        """
        if self._adaptive is not None:
            self._adaptive.load_state_dict(states[0]["adaptive"])  # the same on all
            as_many = len(states) == world  # then nobody reads what others had
            own = states[rank]["replay"] if as_many else deal([state["replay"] for state in states], rank, world)
            self._replay.load_state_dict(own)
            if self._replay.has_teacher_prompts:
                self._check_tokens(states[0].get(READ_IN, {}))

    def _check_tokens(self, kept: Mapping[str, str]) -> None:
        if kept.get("vocabulary") != self._read_in.get("vocabulary"):
            was, now = (each.get("name", "the student's tokenizer") for each in (kept, self._read_in))
            raise ValueError(
                f"the teacher's prompts in its replay buffer are in the tokens of {was}, and this run's teacher reads "
                f"those of {now}. Resume it with the teacher that it had, or start a new run from its weights"
            )


def _tokens_of(other: PreTrainedTokenizerBase | None) -> dict[str, str]:
    return {} if other is None else {"name": tokenizer_name(other), "vocabulary": tokenizer_fingerprint(other)}
