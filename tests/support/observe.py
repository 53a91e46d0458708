"""What tests read off a trainer, and in what a command prints."""

import copy
import dataclasses
import re

import pytest
import torch

from amid_trl import AMiDTrainer


LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def logged(trainer: AMiDTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_runs(trainer, reference, rel=1e-5):
    """Figures and weights."""
    for name in ("loss", "grad_norm", "kl", "teacher_entropy", "top1_agreement", "nll", "eval_loss", "eval_kl"):
        assert logged(trainer, name) == pytest.approx(logged(reference, name), rel=rel), name
    want = weights(reference.model)
    for name, mine in weights(trainer.model).items():
        torch.testing.assert_close(mine, want[name], rtol=rel, atol=1e-6)


def dense_loss(trainer: AMiDTrainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over trained tokens of the objective on the models' own logits."""
    student, teacher = (
        model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[
            :, :-1, : trainer.vocabulary
        ]
        for model in (trainer.model, trainer.teacher_model)
    )
    trained = batch["labels"][:, 1:] != -100
    return trainer.objective(student[trained], teacher[trained]).mean()


class Windows:
    """Remembers every window that a trainer fetches, as (batches, token count), and who wrote it."""

    def __init__(self, trainer: AMiDTrainer):
        self.windows, self.sources, fetch = [], [], trainer.get_batch_samples

        def fetch_and_remember(*args):
            batches, count = fetch(*args)
            self.windows.append((copy.deepcopy(batches), count))
            self.sources.append(trainer._parts.window.source)
            return batches, count

        trainer.get_batch_samples = fetch_and_remember


def completions_of(window) -> list[list[int]]:
    batches, _ = window
    return [row[row != -100].tolist() for batch in batches for row in batch["labels"]]


# All that a command may say beside its mistakes: our own lines, transformers' logs, and bars.
SAID = re.compile(
    r"\s*$|\s*\d+%\||(Loading weights|Generating \w+ split|Tokenizing \w+ dataset|Writing model shards|Teacher"
    r"|references|completions|Filter|Map): "  # bars
    r"|amid-trl [\w-]+: the settings are read; loading "  # the first line of a training
    r"|\{'|Memory per process|  .+ [MG]iB  |✅ Training completed|💾 Model saved to "  # a training
    r"|Stopping: |Stopped at step |amid-trl \w+: stopped"  # its end by a signal
    r"|W\d{4} .+ torch/distributed/elastic/.+ (SIGTERM|death signal)"  # what torch says of it
    r"|\[transformers\] mtime may not be reliable"  # two checkpoints within what the file system can tell apart
    r"|\d+/\d+ .+: done|Mean |# |## |\||\d{4}-\d\d-\d\dT.+; model "  # evaluate, compare
    r"|/.+: ((results|comparison)\.json|report\.html)|/.+: \d+ (rows|of \d+ layers)|/.+: merged /"  # where results lie
)


def unwanted(printed: str) -> list[str]:
    """The lines that are none of these: a user can do nothing about them, or they are new."""
    return [line for line in printed.splitlines() if not SAID.match(line)]


def field_names(config: type) -> set[str]:
    """Of a dataclass."""
    return {field.name for field in dataclasses.fields(config)}


def unclassified(fields: set[str], *classes) -> list[str]:
    """Fields that are in no class, or in several."""
    return sorted(name for name in fields if sum(name in one for one in classes) != 1)
