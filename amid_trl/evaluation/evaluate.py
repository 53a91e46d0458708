"""`amid-trl evaluate`: what a model writes and what it expects, measured as for the tables of the paper.

Every prompt is answered once with each seed, and the first reference is scored behind its prompt. What a batch has
written is kept at once, and its random numbers depend on the seed and the batch alone, so that a run that was killed
goes on and ends in the same figures.
"""

import logging
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from amid_trl.data.batches import PromptTokens, completion_batch
from amid_trl.evaluation import harness
from amid_trl.evaluation import sets as evaluation_sets
from amid_trl.evaluation.figures import row_figures
from amid_trl.evaluation.models import (
    EncodedExample,
    EvaluationModels,
    Given,
    model_name,
    open_models,
    weights_fingerprint,
)
from amid_trl.evaluation.results import Record, ResultFolder, results_table
from amid_trl.evaluation.scores import distinct_n, rouge_l_each, rouge_scorer
from amid_trl.evaluation.sets import EvaluationSet
from amid_trl.evaluation.settings import EvaluationSettings
from amid_trl.maths.figures import Figures
from amid_trl.models.generation import completion_seed, generate_completions
from amid_trl.models.heads import causal_lm
from amid_trl.outputs import fingerprint, sole_use, versions


logger = logging.getLogger(__name__)


def evaluate(
    model: Given,
    output_dir: str | Path,
    settings: EvaluationSettings,
    *,
    teacher: Given | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Record:
    """What `output_dir/results.json` holds afterwards; docs/evaluation.md says what the figures are.

    Models are names, paths, paths of adapters, or in memory; the tokenizer is by default the one beside `model`.
    `dtype` and `trust_remote_code` are for models that are loaded here.

    Raises:
        ValueError: a setting, a row of the set, a task, the tokenizers or the folder do not fit.
        ImportError: an optional package is missing; the message names the extra.
    """
    settings.check_teacher(teacher)
    manager = harness.task_manager(settings.lm_eval) if settings.lm_eval else None
    examples = None
    if settings.evaluation_set:
        rouge_scorer()
        examples = evaluation_sets.load(settings.evaluation_set, settings.limit)
    models = open_models(model, teacher, tokenizer, dtype, trust_remote_code)
    asked = harness.tokenizer_of_tasks(models.tokenizer, settings)
    rows = models.encode(examples, settings.max_new_tokens) if examples else []

    about: Record = {"model": model_name(model), "weights": weights_fingerprint(models.student), "dtype": dtype}
    about |= {"teacher": None, **settings.record()}
    if teacher is not None and models.teacher is not None:
        about |= {"teacher": model_name(teacher), "teacher_weights": weights_fingerprint(models.teacher)}
    if examples:
        tokens = [[part.tolist() for part in (row.prompt, row.context, row.reference)] for row in rows]
        about |= {"set_version": examples.version, "set_rows": examples.fingerprint}
        about |= {"row_tokens": fingerprint([tokens, models.ends]), "vocabulary": models.vocabulary}
    if files := [Path(task) for task in settings.lm_eval if Path(task).is_file()]:
        about |= {"task_files": fingerprint([file.read_text(encoding="utf-8") for file in files])}
    with sole_use(Path(output_dir)):
        folder = ResultFolder(output_dir, about)
        if (finished := folder.results()) is not None:
            logger.warning("%s holds these results already, of %s", output_dir, finished["date"])
            return finished

        date = datetime.now(UTC).isoformat("T", "seconds")
        results: Record = {"settings": about, "versions": versions(), "date": date}
        results |= _measure(models, examples, rows, settings, folder) if examples else {"metrics": {}, "per_seed": {}}
        if manager is not None:
            results["metrics"] |= harness.run_tasks(causal_lm(models.student), asked, manager, settings)
        folder.finish(results, results_table(results))
        return results


def _measure(
    models: EvaluationModels,
    examples: EvaluationSet,
    rows: Sequence[EncodedExample],
    settings: EvaluationSettings,
    folder: ResultFolder,
) -> Record:
    batches = _by_length(rows, settings.batch_size)
    figures = _reference_figures(models, rows, batches)
    tokens = torch.tensor([len(row.reference) for row in rows])
    metrics = {name: (total / tokens.sum()).item() for name, total in figures.totals().items()}
    if written_bytes := sum(row.reference_bytes for row in rows):
        metrics["bits_per_byte"] = figures["nll"].sum().item() / math.log(2) / written_bytes
    metrics |= {"reference_tokens": int(tokens.sum()), "reference_bytes": written_bytes}
    metrics["cut_prompts"] = sum(row.is_cut for row in rows)
    of_rows = [
        {
            "prompt": example.prompt,
            "references": example.references,
            "tokens": len(row.reference),
            "bytes": row.reference_bytes,
            **dict(zip(figures.names, means, strict=True)),
        }
        for example, row, means in zip(
            examples.examples, rows, (figures.columns / tokens[:, None]).tolist(), strict=True
        )
    ]

    references = [example.references for example in examples.examples]
    completions: list[Record] = []
    per_seed: dict[str, dict[str, float]] = {}
    for seed, written in _write(models, rows, batches, settings, folder).items():
        scores = rouge_l_each([completion["text"] for completion in written], references)
        scored = [completion | {"rougeL": score} for completion, score in zip(written, scores, strict=True)]
        per_seed[str(seed)] = _seed_metrics(scored)
        completions += [{"seed": seed, **_without_ids(completion)} for completion in scored]
    columns = {name: [of_seed[name] for of_seed in per_seed.values()] for name in next(iter(per_seed.values()))}
    metrics |= {name: fmean(values) for name, values in columns.items()} | {"rougeL_std": pstdev(columns["rougeL"])}
    return {"metrics": metrics, "per_seed": per_seed, "rows": of_rows, "completions": completions}


def _by_length(rows: Sequence[EncodedExample], batch_size: int) -> list[list[int]]:
    """The numbers of rows of like length, a batch in each list; the longest first, to see at once if memory lacks."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt), reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _reference_figures(models: EvaluationModels, rows: Sequence[EncodedExample], batches: list[list[int]]) -> Figures:
    """Sums over the tokens of each row's reference."""
    parts = []
    for batch in tqdm(batches, desc="references", unit="batch"):
        prompts = [PromptTokens(rows[i].context) for i in batch]
        padded = completion_batch(prompts, [rows[i].reference for i in batch], models.pad)
        parts.append(row_figures(models.student, models.teacher, padded, models.vocabulary))
    by_length = torch.cat([part.columns for part in parts])
    columns = torch.empty_like(by_length)
    columns[torch.tensor([i for batch in batches for i in batch])] = by_length
    return Figures(parts[0].names, columns)


def _write(
    models: EvaluationModels,
    rows: Sequence[EncodedExample],
    batches: list[list[int]],
    settings: EvaluationSettings,
    folder: ResultFolder,
) -> dict[int, list[Record]]:
    """The completions of each seed in the order of the rows; what the folder has already is not written again."""
    known = folder.batches()
    sampling = models.sampling(settings)
    places = [(seed, number) for seed in settings.seeds for number in range(len(batches))]
    missing = [place for place in places if place not in known]
    for seed, number in tqdm(missing, initial=len(known), total=len(places), desc="completions", unit="batch"):
        prompts = [rows[i].prompt for i in batches[number]]
        completions = _completions(models, prompts, sampling, completion_seed(seed, number, 0))
        known[seed, number] = [{"row": i, **each} for i, each in zip(batches[number], completions, strict=True)]
        folder.add_batch(seed, number, known[seed, number])
    return {
        seed: sorted((each for place in places if place[0] == seed for each in known[place]), key=lambda c: c["row"])
        for seed in settings.seeds
    }


def _completions(
    models: EvaluationModels, prompts: list[Tensor], sampling: GenerationConfig, seed: int
) -> list[Record]:
    """What the student writes, and how much it surprises the teacher; the random state stays as it is."""
    student = causal_lm(models.student)
    with torch.random.fork_rng(devices=[student.device] if student.device.type == "cuda" else []):
        torch.manual_seed(seed)
        completions = generate_completions(student, prompts, sampling)
    records: list[Record] = [
        {
            "ids": ids.tolist(),
            "text": str(models.tokenizer.decode(ids, skip_special_tokens=True)).strip(),
            "tokens": len(ids),
            "clipped": int(ids[-1]) not in models.ends,
        }
        for ids in completions
    ]
    if models.teacher is None:
        return records
    padded = completion_batch([PromptTokens(ids) for ids in prompts], completions, models.pad)
    nll = row_figures(models.teacher, None, padded, models.vocabulary)["nll"]
    return [record | {"teacher_nll": value} for record, value in zip(records, nll.tolist(), strict=True)]


def _without_ids(completion: Record) -> Record:
    return {name: value for name, value in completion.items() if name != "ids"}


def _seed_metrics(completions: list[Record]) -> dict[str, float]:
    texts = [completion["text"] for completion in completions]
    metrics = {
        "rougeL": fmean(completion["rougeL"] for completion in completions),
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "mean_length": fmean(completion["tokens"] for completion in completions),
        "clipped_ratio": fmean(completion["clipped"] for completion in completions),
    }
    if "teacher_nll" in completions[0]:
        nats = sum(completion["teacher_nll"] for completion in completions)
        metrics["teacher_perplexity"] = math.exp(nats / sum(completion["tokens"] for completion in completions))
    return metrics
