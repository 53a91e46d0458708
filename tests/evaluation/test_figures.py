import math
import sys

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama
from transformers import Gemma2Config, Gemma2ForCausalLM

from amid_trl.evaluation.figures import token_metrics
from amid_trl.evaluation.scores import distinct_n, rouge_l
from amid_trl.models.generation import generate_greedy


METRICS = ("objective", "kl_pq", "kl_qp", "top1_agreement", "nll")


def weighted_distance(student_logits, teacher_logits):
    """Σ q (q - p)²: another value if the arguments are swapped."""
    q, p = student_logits.softmax(-1), teacher_logits.softmax(-1)
    return (q * (q - p).square()).sum(-1)


def batch_of(rows: list[list[int]], first_trained: list[int], pad: int = 0, length: int | None = None):
    """Right-padded batch in which row i is trained from token first_trained[i] on."""
    length = length or max(map(len, rows))
    input_ids = torch.full((len(rows), length), pad)
    labels, attention_mask = torch.full_like(input_ids, -100), torch.zeros_like(input_ids)
    for i, (row, first) in enumerate(zip(rows, first_trained, strict=True)):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
        labels[i, first : len(row)] = torch.tensor(row[first:])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


ROWS = [[5, 90, 14, 33, 71, 8], [40, 7, 7, 120], [250, 3, 61, 18, 9]]
FIRST = [3, 1, 2]


def by_hand(student, teacher, rows=ROWS, first=FIRST, vocab=None) -> dict[str, float]:
    """The definition, token by token and row by row, in float64 and probability space."""
    values = {name: [] for name in METRICS}
    for row, start in zip(rows, first, strict=True):
        with torch.no_grad():
            q, p = (
                model(torch.tensor([row])).logits[0, :, :vocab].double().softmax(-1) for model in (student, teacher)
            )
        for position in range(start, len(row)):
            a, b = p[position - 1], q[position - 1]
            values["objective"].append(float((b * (b - a).square()).sum()))
            values["kl_pq"].append(float((a * (a / b).log()).sum()))
            values["kl_qp"].append(float((b * (b / a).log()).sum()))
            values["top1_agreement"].append(float(a.argmax() == b.argmax()))
            values["nll"].append(-math.log(float(b[row[position]])))
    return {name: sum(value) / len(value) for name, value in values.items()} | {"tokens": len(values["nll"])}


def assert_same(got: dict[str, float], want: dict[str, float], relative: float = 2e-5):
    assert got == pytest.approx(want, rel=relative, abs=1e-7)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_metrics_are_their_definitions(tokenizer, teacher, build):
    student = build(tokenizer, seed=5)
    want = by_hand(student, teacher)
    assert want["tokens"] == 3 + 3 + 3
    assert want["kl_pq"] > 0.3 and want["kl_pq"] != pytest.approx(want["kl_qp"], rel=1e-2)
    assert_same(token_metrics(student, teacher, [batch_of(ROWS, FIRST)], weighted_distance), want)


def test_the_head_applies_its_own_soft_cap(teacher, tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(
        vocab_size=len(tokenizer), head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.2, **sizes
    )
    torch.manual_seed(0)  # close to the cap two tokens may be equally likely in float32
    student = Gemma2ForCausalLM(config).eval()
    assert_same(token_metrics(student, teacher, [batch_of(ROWS, FIRST)], weighted_distance), by_hand(student, teacher))


def test_every_token_counts_once_whatever_batch_it_is_in(student, teacher):
    split = [batch_of(ROWS[:1], FIRST[:1]), batch_of(ROWS[1:], FIRST[1:])]
    whole = token_metrics(student, teacher, [batch_of(ROWS, FIRST)], weighted_distance)
    assert_same(token_metrics(student, teacher, split, weighted_distance), whole)


def test_padding_changes_nothing(student, teacher):
    plain = token_metrics(student, teacher, [batch_of(ROWS, FIRST)], weighted_distance)
    padded = batch_of(ROWS, FIRST, pad=200, length=17)
    assert_same(token_metrics(student, teacher, [padded], weighted_distance), plain)


def test_a_label_scores_the_logits_of_the_token_before_it(student, teacher):
    only_second = token_metrics(student, teacher, [batch_of([[11, 12]], [1])], weighted_distance)
    with torch.no_grad():
        first = student(torch.tensor([[11]])).logits[0, 0].double().log_softmax(-1)
    assert only_second["nll"] == pytest.approx(-float(first[12]), rel=1e-5)
    assert only_second["tokens"] == 1


def test_a_trained_first_token_has_no_logits_to_score(student, teacher):
    assert token_metrics(student, teacher, [batch_of(ROWS, [0, 0, 0])], weighted_distance)["tokens"] == 5 + 3 + 4


def test_a_batch_without_trained_tokens_adds_nothing(student, teacher):
    batch = batch_of(ROWS, FIRST)
    masked = batch | {"labels": torch.full_like(batch["labels"], -100)}
    plain = token_metrics(student, teacher, [batch], weighted_distance)
    assert_same(token_metrics(student, teacher, [masked, batch, masked], weighted_distance), plain)


def test_nothing_to_average_is_an_error(student, teacher):
    batch = batch_of(ROWS, FIRST)
    masked = batch | {"labels": torch.full_like(batch["labels"], -100)}
    for batches in ([masked], []):
        with pytest.raises(ValueError, match="no trained token"):
            token_metrics(student, teacher, batches, weighted_distance)


def test_a_model_compared_with_itself_is_at_distance_zero(teacher):
    metrics = token_metrics(teacher, teacher, [batch_of(ROWS, FIRST)], weighted_distance)
    assert metrics["top1_agreement"] == 1
    assert [metrics[name] for name in ("objective", "kl_pq", "kl_qp")] == pytest.approx([0, 0, 0], abs=1e-6)


def test_a_padded_vocabulary_is_cut_to_the_common_one(tokenizer, student):
    padded = tiny_llama(tokenizer, seed=1, vocab_size=len(tokenizer) + 24)
    got = token_metrics(student, padded, [batch_of(ROWS, FIRST)], weighted_distance)
    assert_same(got, by_hand(student, padded, vocab=len(tokenizer)))


def test_modes_come_back_and_no_gradient_is_left(student, teacher):
    student.train()
    teacher.eval()
    token_metrics(student, teacher, [batch_of(ROWS, FIRST)], weighted_distance)
    assert student.training and not teacher.training
    assert all(parameter.grad is None for model in (student, teacher) for parameter in model.parameters())


def test_dropout_is_off_while_measuring(tokenizer, teacher):
    student = tiny_gpt2(tokenizer, seed=5, resid_pdrop=0.5)
    want = by_hand(student.eval(), teacher)
    assert_same(token_metrics(student.train(), teacher, [batch_of(ROWS, FIRST)], weighted_distance), want)


def test_no_more_than_a_chunk_of_tokens_meets_the_vocabulary(monkeypatch, student, teacher):
    two_tokens = 2 * student.config.vocab_size
    monkeypatch.setattr("amid_trl.maths.linear.CPU_ELEMENTS", (two_tokens, two_tokens))
    shapes = []

    def objective(student_logits, teacher_logits):
        shapes.append(student_logits.shape)
        return weighted_distance(student_logits, teacher_logits)

    got = token_metrics(student, teacher, [batch_of(ROWS, FIRST)], objective)
    assert [shape[0] for shape in shapes] == [2, 2, 2, 3]  # none is left alone
    assert_same(got, by_hand(student, teacher))


PROMPTS = [
    [{"role": "user", "content": "What is the capital of France? Answer every question in one short sentence."}],
    [{"role": "user", "content": "Is fire cold?"}],
    "The little owl",
    [{"role": "user", "content": "How many apples are there?"}],
]


def greedy_by_hand(model, tokenizer, prompt, steps: int) -> str:
    text = prompt
    if not isinstance(prompt, str):
        text = f"<|im_start|>user\n{prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_greedy_answers_are_the_argmax_of_each_prompt_alone(student, tokenizer, batch_size):
    student.generation_config.repetition_penalty = 5.0  # ships with the model, and is not greedy
    want = [greedy_by_hand(student, tokenizer, prompt, 6) for prompt in PROMPTS]
    assert generate_greedy(student, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size) == want
    assert len(set(want)) > 1


def test_a_tokenizer_without_padding_still_answers(student, tokenizer):
    want = generate_greedy(student, tokenizer, PROMPTS, max_new_tokens=4)
    tokenizer.pad_token = None
    assert generate_greedy(student, tokenizer, PROMPTS, max_new_tokens=4) == want


def test_no_prompts_give_no_answers(student, tokenizer):
    assert generate_greedy(student, tokenizer, [], max_new_tokens=4) == []


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # "the cat sat" in order: recall 3/3, precision 3/4, F = 2 * 3/4 / (7/4) = 6/7.
    assert rouge_l(["the black cat sat"], ["the cat sat"]) == pytest.approx(100 * 6 / 7)


def test_rouge_l_stems_words_and_takes_the_best_reference():
    assert rouge_l(["cats running"], ["the cat runs"]) == pytest.approx(100 * 2 * 2 / (2 + 3))
    assert rouge_l(["paris", "nothing"], [["london", "Paris!"], ["x"]]) == pytest.approx(50)


def test_distinct_n_is_the_share_of_different_ngrams_in_all_texts():
    texts = ["a b a", "a  b\nc", "d"]
    assert distinct_n(texts, 1) == 4 / 7
    assert distinct_n(texts, 2) == 3 / 4
    assert distinct_n(texts, 4) == 0


def test_rouge_l_refuses_unequal_lists():
    with pytest.raises(ValueError, match="got 1 predictions and 2 entries"):
        rouge_l(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="got 0 predictions"):
        rouge_l([], [])


def test_rouge_l_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r"amid-trl\[eval\]"):
        rouge_l(["a"], ["a"])
