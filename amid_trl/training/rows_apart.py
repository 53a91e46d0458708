"""Whether the student tells rows apart that lie one behind the other, tried before anything is trained."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from amid_trl.models.own_logits import check_rows_apart, check_rows_apart_at_last
from amid_trl.run import Run
from amid_trl.training.config import AMiDConfig


class RowsApart(TrainerCallback):
    """Tries it when the run is opened, or once an engine has put the student where it runs, as flash attention needs.

    A ValueError names a student that does not.
    """

    def __init__(self, run: Run[AMiDConfig], student: nn.Module, wrapped: Callable[[], nn.Module]):
        self._asked, self._accelerator, self._wrapped = run.args.padding_free, run.accelerator, wrapped
        self._tried = not self._asked or check_rows_apart(student, "student")

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """All processes are here."""
        if self._asked:
            check_rows_apart_at_last(self._wrapped(), "student", self._accelerator, tried=self._tried)
            self._tried = True
