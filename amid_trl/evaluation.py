"""How close a student is to its teacher and to reference answers: numbers only, no training and no randomness."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

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
    modes = [(model, model.training) for model in (student, teacher)]
    for model, _ in modes:
        model.eval()
    try:
        sums = sum(_token_figures(student, teacher, batch, objective).double().sum(0).cpu() for batch in batches)
    finally:
        for model, training in modes:
            model.train(training)
    *totals, tokens = sums.tolist() if isinstance(sums, Tensor) else [0.0]
    if not tokens:
        raise ValueError("token_metrics: the batches have no trained token (every label is -100)")
    names = ("objective", "kl_pq", "kl_qp", "top1_agreement", "nll")
    return {name: total / tokens for name, total in zip(names, totals, strict=True)} | {"tokens": int(tokens)}


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
    """Mean ROUGE-L F-measure in percent, with stemming; of several references the best one counts.

    The metric of the paper's tables (arXiv 2510.15982), which it takes from MiniLLM's evaluation.

    Raises:
        ImportError: rouge-score is not installed.
        ValueError: no predictions, or not one entry of references for each.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("rouge_l needs the package rouge-score: pip install 'amid-trl[eval]'") from error
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"rouge_l needs one or more references for each prediction; got {len(predictions)} predictions and "
            f"{len(references)} entries of references"
        )
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in _as_list(options))
        for prediction, options in zip(predictions, references, strict=True)
    ]
    return 100 * sum(best) / len(best)


def _token_figures(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Mapping[str, Tensor],
    objective: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """One row for each trained token: the five figures of `token_metrics`, and a 1 to count it."""
    labels = batch["labels"][:, 1:]
    trained = labels != -100
    models = [causal_lm(student), causal_lm(teacher)]
    device = models[0].device
    hidden = [_trained_states(model, batch, trained).to(device) for model in models]
    heads = [language_model_head(model) for model in models]
    vocab = min(len(head.weight) for head in heads)

    def figures(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log_p, log_q = (at_least_float32(z).log_softmax(-1) for z in (teacher_logits, student_logits))
        agrees = log_p.argmax(-1) == log_q.argmax(-1)
        nll = -log_q.gather(-1, labels[:, None]).squeeze(-1)
        value = objective(student_logits, teacher_logits)
        each = [value, kl(log_p, log_q), kl(log_q, log_p), agrees, nll, torch.ones_like(nll)]
        return value, torch.stack([figure.to(nll) for figure in each], dim=-1)

    columns = (labels[trained].to(device),)
    ours, theirs = (States(states, head.cut(vocab)) for states, head in zip(hidden, heads, strict=True))
    return linear_token_loss(ours, theirs, figures, columns)[1]


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
