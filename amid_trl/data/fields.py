"""The fields of AMiDConfig that say how rows are made."""

from dataclasses import dataclass
from typing import Literal

from amid_trl.fields import JSON, Fields, check_at_least, check_choice, check_weights, json_dict, option


@dataclass
class DataFields(Fields):
    """Parameters that control the data."""

    assistant_turns: Literal["all", "last"] = option(
        "all", "Which turns of a conversation are trained: all assistant turns, or the last one, as GKD does."
    )
    chat_template_kwargs: JSON = option(None, 'Passed to the chat template, e.g. {"enable_thinking": false}.')
    teacher_chat_template_kwargs: JSON = option(
        None,
        "Passed to the chat template besides for the prompt that the teacher reads, the column teacher_prompt or else "
        "the student's.",
    )
    pretrain_dataset: str | None = option(
        None,
        "Name or path of a dataset of plain text whose train split is streamed beside the distillation. Its column "
        "dataset_text_field is read as blocks of max_length tokens, as many to a micro-batch as it has rows. The "
        "trainer also takes a dataset.",
    )
    pretrain_dataset_config: str | None = option(None, "Its configuration, for a dataset that has several.")
    pretrain_weight: float = option(
        1.0, "Weight of the student's mean cross-entropy on that text, added to the loss (the paper's code: 1)."
    )

    def __post_init__(self):
        """Refuse what cannot work."""
        super().__post_init__()
        check_choice(self, "assistant_turns", ("all", "last"))
        check_weights(self, "pretrain_weight")
        check_at_least(self, 1, "max_length")
        if self.packing:
            self._check_packing()
        if self.padding_free and self.pad_to_multiple_of not in (None, "auto"):
            raise ValueError(
                f"pad_to_multiple_of={self.pad_to_multiple_of} pads rows, and padding_free=True trains them without"
            )
        if unknown := sorted(json_dict(self.dataset_kwargs).keys() - {"skip_prepare_dataset"}):
            raise ValueError(f"dataset_kwargs may have skip_prepare_dataset alone; got {', '.join(unknown)}")

    def _check_packing(self) -> None:
        """Packed rows are read without padding, as in TRL."""
        self.padding_free = True
        if self.max_length is None:
            raise ValueError("packing=True fills rows up to max_length tokens; set max_length")
        if self.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "packing=True leaves rows of one length, which train_sampling_strategy cannot group by it"
            )
