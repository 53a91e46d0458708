"""How close a student is to its teacher and to reference answers: numbers only, no training and no randomness."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from amid_trl._trl import backbone_states, causal_lm, language_model_head
from amid_trl.assistant import at_least_float32
from amid_trl.divergences import kl
from amid_trl.generation import eos_token_ids, generate_completions
from amid_trl.linear import States, linear_token_loss


@torch.no_grad()
def token_metrics(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    objective: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, float]:
    """Means over the trained tokens of all batches, each token counted once, whatever batch it is in.

    - `objective`: `objective(student_logits, teacher_logits)`
    - `kl_pq`, `kl_qp`: KL(p || q) and KL(q || p), p teacher, q student, at temperature 1, in nats
    - `top1_agreement`: share of the tokens for which both models hold the same token most likely
    - `nll`: the student's -log q(label), in nats
    - `tokens`: how many trained tokens there are

    A batch has `input_ids`, `attention_mask` and `labels`, all (rows, tokens); the label of token i + 1 is what the
    logits at i are scored by, and a label of -100 is not trained. Only trained positions are projected to the
    vocabulary, a bounded number at a time. Heads of different sizes are cut to the smaller vocabulary.

    Raises:
        ValueError: no batch has a trained token, so that there is nothing to take the mean of.
    """
    with _evaluating(student, teacher):
        sums = sum(_token_figures(student, teacher, batch, objective).double().sum(0).cpu() for batch in batches)
    *totals, tokens = sums.tolist() if isinstance(sums, Tensor) else [0.0]
    if not tokens:
        raise ValueError("token_metrics: the batches have no trained token (every label is -100)")
    names = ("objective", "kl_pq", "kl_qp", "top1_agreement", "nll")
    return {name: total / tokens for name, total in zip(names, totals, strict=True)} | {"tokens": int(tokens)}


@torch.no_grad()
def row_figures(
    student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Mapping[str, Tensor], vocabulary: int
) -> Tensor:
    """Sums over the trained tokens of each row, (rows, figures) in float64; the batch is one of `token_metrics`.

    The first figure is the student's -log q(label). With a teacher KL(p || q) follows, both in nats, and for how many
    tokens both hold the same token most likely. Only the first `vocabulary` tokens count.
    """
    models = [student] if teacher is None else [student, teacher]
    with _evaluating(*models):
        figures = _figures_at_trained(models, batch, _nll if teacher is None else _comparison, vocabulary)
    rows = (batch["labels"][:, 1:] != -100).nonzero()[:, 0].cpu()
    sums = torch.zeros(len(batch["labels"]), figures.shape[1], dtype=torch.float64)
    return sums.index_add_(0, rows, figures.cpu().double())


def generate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """The most likely next token over and over, until an EOS or for `max_new_tokens`: one answer for each prompt.

    A prompt is a text, taken as it is, or a list of chat messages, to which the chat template adds the start of the
    assistant's turn. Nothing that ships with the model bends the choice (repetition penalties, banned n-grams).
    """
    ids = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    ends = eos_token_ids(tokenizer, model.generation_config)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, disable_compile=True
    )
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    completions = generate_completions(model, [ids[i] for i in order], config, batch_size)
    answers = [""] * len(ids)
    for i, completion in zip(order, completions, strict=True):
        answers[i] = str(tokenizer.decode(completion, skip_special_tokens=True)).strip()
    return answers


def rouge_l(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """The mean of `rouge_l_each`."""
    each = rouge_l_each(predictions, references)
    return sum(each) / len(each)


def rouge_l_each(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[float]:
    """ROUGE-L F-measure of every prediction in percent, with stemming; of several references the best one counts.

    The metric of the paper's tables (arXiv 2510.15982), which it takes from MiniLLM's evaluation.

    Raises:
        ImportError: rouge-score is not installed.
        ValueError: no predictions, or not one entry of references for each.
    """
    scorer = rouge_scorer()
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"rouge_l needs one or more references for each prediction; got {len(predictions)} predictions and "
            f"{len(references)} entries of references"
        )
    return [
        100 * max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in _as_list(options))
        for prediction, options in zip(predictions, references, strict=True)
    ]


def rouge_scorer() -> Any:
    """The scorer of the package rouge-score; ImportError if that is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE-L needs the package rouge-score: pip install 'amid-trl[eval]'") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Different n-grams of words, as a share of all n-grams of words in all texts together (arXiv 1510.03055).

    A word is what stands between spaces. 0 if no text has n words.
    """
    ngrams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


@contextmanager
def _evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Without dropout; afterwards every model is in the mode in which it was."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, training in zip(models, modes, strict=True):
            model.train(training)


def _token_figures(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Mapping[str, Tensor],
    objective: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """One row for each trained token: the five figures of `token_metrics`, and a 1 to count it."""

    def figures(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log_p, log_q = _log_softmax(teacher_logits), _log_softmax(student_logits)
        agrees = log_p.argmax(-1) == log_q.argmax(-1)
        nll = -log_q.gather(-1, labels[:, None]).squeeze(-1)
        value = objective(student_logits, teacher_logits)
        each = [value, kl(log_p, log_q), kl(log_q, log_p), agrees, nll, torch.ones_like(nll)]
        return value, torch.stack([figure.to(nll) for figure in each], dim=-1)

    models = (student, teacher)
    vocabulary = min(len(language_model_head(causal_lm(model)).weight) for model in models)
    return _figures_at_trained(models, batch, figures, vocabulary)


def _nll(student_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    nll = -_log_softmax(student_logits).gather(-1, labels[:, None])
    return nll[:, 0], nll


def _comparison(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p, log_q = _log_softmax(teacher_logits), _log_softmax(student_logits)
    agrees = log_p.argmax(-1) == log_q.argmax(-1)
    nll = -log_q.gather(-1, labels[:, None]).squeeze(-1)
    return nll, torch.stack([nll, kl(log_p, log_q), agrees.to(nll)], dim=-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return at_least_float32(logits).log_softmax(-1)


def _figures_at_trained(
    models: Sequence[PreTrainedModel],
    batch: Mapping[str, Tensor],
    figures: Callable[..., tuple[Tensor, Tensor]],
    vocabulary: int,
) -> Tensor:
    """`figures(student_logits[, teacher_logits], labels)` at the trained tokens, on the student's device."""
    labels = batch["labels"][:, 1:]
    trained = labels != -100
    plain = [causal_lm(model) for model in models]
    device = plain[0].device
    student, *teachers = (
        States(_trained_states(model, batch, trained).to(device), language_model_head(model).cut(vocabulary))
        for model in plain
    )
    columns = (labels[trained].to(device),)
    return linear_token_loss(student, teachers[0] if teachers else None, figures, columns)[1]


def _trained_states(model: PreTrainedModel, batch: Mapping[str, Tensor], trained: Tensor) -> Tensor:
    states = backbone_states(model, batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device))
    return states[:, :-1][trained.to(states.device)]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> Tensor:
    if isinstance(prompt, str):
        return torch.tensor(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return torch.tensor(cast(dict[str, list[int]], encoded)["input_ids"])


def _as_list(options: str | Sequence[str]) -> Sequence[str]:
    return [options] if isinstance(options, str) else options
