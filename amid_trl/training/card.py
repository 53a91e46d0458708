"""What the model card says beside TRL's own text: the paper, the two models, and the settings of the objective."""

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from amid_trl.maths.divergences import DIVERGENCES
from amid_trl.maths.objective import Objective, Term
from amid_trl.models.heads import causal_lm
from amid_trl.sources.fields import ADAPTIVE_FIELDS
from amid_trl.training.config import AMiDConfig
from amid_trl.training.named_teachers import settings_of_teachers


PAPER = {
    "title": "AMiD: Knowledge Distillation for LLMs with α-mixture Assistant Distribution",
    "id": "2510.15982",
    "citation": textwrap.dedent("""\
        @inproceedings{shin2026amid,
            title        = {{AMiD: Knowledge Distillation for LLMs with $\\alpha$-mixture Assistant Distribution}},
            year         = 2026,
            booktitle    = {The Fourteenth International Conference on Learning Representations, {ICLR} 2026},
            eprint       = {2510.15982},
            archiveprefix = {arXiv},
        }"""),
}


# Listed where they are set.
OPTIONAL_FIELDS = (
    "assistant_alpha_schedule",
    "assistant_lambda_schedule",
    "student_text_objective",
    "student_text_objective_kwargs",
    "token_selection",
    "token_selection_count",
)


NO_BASE_MODEL = "[None](https://huggingface.co/None)"  # where TRL's card names a student that came from a folder


NO_HUB_MODEL = 'model="None"'  # in its quick start, of a student that is not pushed


@contextmanager
def card_folder(args: AMiDConfig, folder: str | None) -> Iterator[None]:
    """Within it TRL writes its card into the folder, in place of the trainer's own."""
    before = args.output_dir
    args.output_dir = before if folder is None else folder
    try:
        yield
    finally:
        args.output_dir = before


def complete_card(trainer: Any) -> None:
    """Add the objective's settings to TRL's card, and the names that it lacks: of student, folder and teacher."""
    folder = Path(str(trainer.args.output_dir))
    file = folder / "README.md"
    card = file.read_text(encoding="utf-8").replace(NO_BASE_MODEL, f"`{shown_name(trainer.model)}`")
    card = card.replace(NO_HUB_MODEL, f'model="{folder.resolve().name}"')
    card += "\n\n## Distillation\n\nTrained with `amid_trl.AMiDTrainer`."
    if trainer.teacher_model is not None:
        card += f" Its teacher was {shown_teacher(trainer, trainer.teacher_model)}."
    settings = settings_of_teachers(trainer.args)
    for name, objective in trainer._parts.objectives.current.items():
        if name:
            model = trainer.teacher_models.get(name)
            card += f"\n\n### Rows of the teacher `{name}`"
            card += "" if model is None else f"\n\nIts model was {shown_teacher(trainer, model)}."
        card += f"\n\n{objective_table(settings[name], objective, is_sparse=trainer.teachers[name].is_sparse)}"
    file.write_text(card, encoding="utf-8")


def shown_teacher(trainer: Any, model: nn.Module) -> str:
    """The name of a teacher's model, and whether it has an adapter."""
    teacher = trainer.accelerator.unwrap_model(model)
    return f"`{shown_name(teacher)}`{', with an adapter' if causal_lm(teacher) is not teacher else ''}"


def shown_name(model: nn.Module) -> str:
    """A model's name on the Hub, the last part of its folder's path, or its class if it came from neither."""
    causal = causal_lm(model)
    return _without_folders(causal.name_or_path or "") or type(causal).__name__


def _without_folders(name: str) -> str:
    """A name on the Hub, or what is behind the last slash of a path that is there."""
    return Path(name).resolve().name if name and Path(name).exists() else name


def objective_table(config: AMiDConfig, objective: Objective, *, is_sparse: bool = False) -> str:
    """The settings of the objective, as it was at the end, in Markdown."""
    settings = {"objective": config.objective, "divergence": " + ".join(map(_term, objective.terms))}
    if objective.uses_assistant:
        settings |= {"alpha": objective.alpha, "lam": objective.lam, "detach_assistant": objective.detach_assistant}
    settings |= {"distill_temperature": objective.temperature, "sft_weight": config.sft_weight}
    settings |= {"seq_kd": config.seq_kd, "sampling": config.sampling}
    share = "lmbda" if config.lmbda_schedule is None else "lmbda_schedule"
    shares = ADAPTIVE_FIELDS if config.sampling == "adaptive" else (share,)
    settings |= {name: getattr(config, name) for name in shares}
    settings |= {name: getattr(config, name) for name in OPTIONAL_FIELDS if getattr(config, name) is not None}
    if config.token_selection is not None and config.token_selection_count is None:
        settings["token_selection_share"] = config.token_selection_share
    if is_sparse:
        settings["teacher_top_k"] = config.teacher_top_k
    if config.pretrain_dataset:
        settings["pretrain_dataset"] = _without_folders(config.pretrain_dataset)
        settings["pretrain_weight"] = config.pretrain_weight
    settings |= {"sampling temperature": config.temperature}
    rows = "\n".join(f"| `{name}` | `{value}` |" for name, value in settings.items())
    return f"| setting | value |\n|---|---|\n{rows}\n"


def _term(term: Term) -> str:
    defaults = inspect.signature(DIVERGENCES[term.divergence]).parameters.values()
    parameters = {p.name: p.default for p in defaults if p.kind is p.KEYWORD_ONLY} | dict(term.divergence_kwargs or {})
    arguments = [*term.order, *(f"{name}={value}" for name, value in parameters.items())]
    return f"{'' if term.weight == 1 else f'{term.weight} * '}{term.divergence}({', '.join(arguments)})"
