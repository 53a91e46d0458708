"""GKD's own fields, for a TRL that has no `trl.experimental.gkd` any more: their names, defaults and meaning stay."""

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig


@dataclass
class GKDConfig(SFTConfig):
    """The fields that `trl.experimental.gkd.GKDConfig` 1.16 adds to SFTConfig. Source: GKD (arXiv 2306.13649)."""

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    temperature: float = field(default=0.9, metadata={"help": "Temperature of the sampling."})
    lmbda: float = field(default=0.5, metadata={"help": "Share of the windows that the student writes."})
    beta: float = field(default=0.5, metadata={"help": "Of the generalised Jensen-Shannon divergence, in [0, 1]."})
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens of a completion."})
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Name or path of the teacher."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Passed to from_pretrained of a teacher given by name."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Turn the student's dropout off."})
    seq_kd: bool = field(default=False, metadata={"help": "The teacher writes what the student does not."})
