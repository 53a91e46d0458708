"""All that AMiDConfig adds to TRL's fields: the groups, the run's own, and what they may not say together."""

from dataclasses import dataclass
from typing import Literal

from amid_trl.data.fields import DataFields
from amid_trl.fields import check_at_least, check_choice, check_weights, option, without_effect
from amid_trl.sources.fields import SourceFields
from amid_trl.teacher.fields import TeacherFields
from amid_trl.training.inherited import REFUSED
from amid_trl.training.named_teachers import check_teachers, naming_teacher, settings_of_teachers
from amid_trl.training.objective_fields import ObjectiveFields


# To transformers' words about a machine without a GPU, or with an old one.
WITHOUT_BF16 = (
    "TRL computes in bfloat16 by default. Without a GPU add --use_cpu --bf16 False (use_cpu=True, bf16=False); with "
    "one that has no bfloat16, --bf16 False"
)


@dataclass
class RunFields(ObjectiveFields, TeacherFields, DataFields, SourceFields):
    """Parameters that control the run."""

    nonfinite_loss: Literal["stop", "skip"] = option(
        "stop",
        "When the loss of a micro-batch is NaN or infinite: stop with an error that names the step, the rows and the "
        "last checkpoint with finite weights; skip gives that micro-batch no gradient, with a warning, and logs how "
        "many there were.",
    )
    # transformers would read `str | bool` as a boolean on the command line.
    include_num_input_tokens_seen: str = option(  # pyright: ignore[reportIncompatibleVariableOverride]
        "non_padding", "Count the tokens seen: all, non_padding or no. Gives tokens per second in the logs."
    )

    def __post_init__(self):
        """The groups' own checks, each in its group, then those across them."""
        super().__post_init__()
        for name, (accepted, why) in REFUSED.items():
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"AMiDTrainer does not support {name}={getattr(self, name)!r}: {why}; leave it at {accepted[0]!r}"
                )
        check_at_least(self, 0, "learning_rate", "seed", "dataloader_num_workers")
        if self.router_aux_loss_coef is not None:
            check_weights(self, "router_aux_loss_coef")
        check_choice(self, "nonfinite_loss", ("stop", "skip"))
        if self.packing and (self.num_generations > 1 or self.sampling == "adaptive" or self.use_vllm):
            raise ValueError(
                "packing=True leaves open how many rows a window has, which num_generations, sampling='adaptive' and "
                "use_vllm count on; with padding_free=True alone rows are trained without padding too"
            )
        self.check_text()
        check_teachers(self)

    def check_text(self) -> None:
        """Refuse an objective for text that nobody writes, and a cache for text that is new."""
        if self.student_shares.most == 0:
            without_effect(self, ("student_text_objective",), "on a run without student text; set lmbda")
        elif self.teacher_cache is not None:
            raise ValueError("teacher_cache holds the teacher's answers to the dataset's text alone; set lmbda=0.0")

    def check_trained_with(self) -> None:
        """Of each teacher, as of a single one."""
        for name, own in settings_of_teachers(self).items():
            with naming_teacher(name):
                TeacherFields.check_trained_with(own)

    def check_steps(self) -> None:
        """Refuse to train for no step: schedules are of a run's progress."""
        if self.max_steps == 0:
            raise ValueError("max_steps=0 trains nothing: give a positive number, or leave it out for epochs")


GROUPS = (ObjectiveFields, TeacherFields, DataFields, SourceFields, RunFields)
