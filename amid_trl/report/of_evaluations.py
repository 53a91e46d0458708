"""Evaluations on the same rows: their metrics, and what each model answers, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from amid_trl.evaluation.metrics import METRICS
from amid_trl.report.kinds import Found, check_keys
from amid_trl.report.page import PageSection, PromptAnswers, Table, number


SHOWN_SETTINGS = ("evaluation_set", "teacher", "seeds", "temperature", "top_p", "max_new_tokens", "lm_eval")
REFERENCE = "reference"


def evaluation_section(evaluations: Sequence[Found], prompts: int) -> PageSection:
    """One section for evaluations on one set."""
    settings = [each.content["settings"] for each in evaluations]
    evaluation_set = settings[0].get("evaluation_set")
    names = dict.fromkeys(metric for each in evaluations for metric in each.content["metrics"])
    rows = [
        (_titled(metric), [number(each.content["metrics"].get(metric)) for each in evaluations]) for metric in names
    ]
    contents = {each.name: each.content for each in evaluations}
    for each in evaluations:
        check_answers(each)
    return PageSection(
        title=f"Evaluation on {evaluation_set}" if evaluation_set else "Evaluation",
        facts=[(name, _of_all(settings, name)) for name in SHOWN_SETTINGS if any(of.get(name) for of in settings)],
        tables=[Table("Means over rows and sampling seeds", ["metric", *contents], rows)],
        answers_of="Answers side by side",
        answers=side_by_side(contents, prompts),
    )


def check_answers(evaluation: Found) -> None:
    """Refuse rows and completions that are not those of `amid-trl evaluate`; tasks of lm-eval alone have none."""
    for part, keys in {"rows": ("prompt", "references"), "completions": ("seed", "row", "text")}.items():
        for each in evaluation.content.get(part, []):
            check_keys(each, keys, f"one of the {part} in {evaluation.file}", evaluation.kind)


def side_by_side(evaluations: Mapping[str, Mapping[str, Any]], prompts: int) -> list[PromptAnswers]:
    """The first prompts, each with its first reference and what every model has answered with its first seed."""
    first = next(iter(evaluations.values()))
    texts = {name: _first_texts(content) for name, content in evaluations.items()}
    reference = f"{REFERENCE} of the set" if REFERENCE in evaluations else REFERENCE
    return [
        PromptAnswers(
            _prompt_text(row["prompt"]),
            [(reference, row["references"][0]), *((name, of_model.get(i, "")) for name, of_model in texts.items())],
        )
        for i, row in enumerate(first.get("rows", [])[:prompts])
    ]


def _first_texts(content: Mapping[str, Any]) -> dict[int, str]:
    completions = content.get("completions", [])
    return {each["row"]: each["text"] for each in completions if each["seed"] == completions[0]["seed"]}


def _prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A text, or the turns of a chat; of a single one what it says."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _titled(metric: str) -> str:
    return f"{metric}: {METRICS[metric].title}" if metric in METRICS else metric


def _of_all(settings: Sequence[Mapping[str, Any]], name: str) -> str:
    values = dict.fromkeys(str(of.get(name)).strip("[]") for of in settings)
    return "; ".join(values)
