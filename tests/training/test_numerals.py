"""Numbers that one model writes as a token and the other as digits: where a wrong set of outcomes does harm.

X-Token (arXiv 2605.21699) found a student worse at arithmetic than without a teacher, because the numerals of one
vocabulary have no like in the other's. Here the teacher knows all products of two digits, and nothing else teaches.
"""

import itertools

import pytest
import torch
from datasets import Dataset
from every_text import bpe
from tiny import save_tiny, tiny_llama


PRODUCTS = [(f"{a}*{b}=", str(a * b)) for a, b in itertools.product(range(10), repeat=2)]
NUMERALS = [tuple(str(number)) for number in range(10, 100)]
TOKENIZERS = {"digits": [], "numerals": NUMERALS}


def model_of(name: str, seed: int):
    tokenizer = bpe("0123456789*=", TOKENIZERS[name])
    return tiny_llama(tokenizer, seed=seed, hidden_size=64, initializer_range=0.1), tokenizer


def rows_of(tokenizer):
    """All products in tokens, the length of the question, and where they are padded -100."""
    asked = [len(tokenizer(question)["input_ids"]) for question, _ in PRODUCTS]
    ids = [[*tokenizer("".join(row))["input_ids"], tokenizer.eos_token_id] for row in PRODUCTS]
    longest = max(map(len, ids))
    inputs = torch.tensor([[*row, *[tokenizer.pad_token_id] * (longest - len(row))] for row in ids])
    labels = torch.tensor(
        [[*[-100] * n, *row[n:], *[-100] * (longest - len(row))] for n, row in zip(asked, ids, strict=True)]
    )
    return inputs, labels


def learn(model, tokenizer, steps: int) -> None:
    inputs, labels = rows_of(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def likelihood(model, tokenizer) -> float:
    """Mean probability of the right answer, its end included."""
    inputs, labels = rows_of(tokenizer)
    logs = model(input_ids=inputs).logits[:, :-1].log_softmax(-1)
    answers, labels = labels[:, 1:] >= 0, labels[:, 1:]
    of_label = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (of_label * answers).sum(-1).exp().mean().item()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("students", "teachers"), [("digits", "numerals"), ("numerals", "digits")])
def test_a_student_learns_products_from_a_teacher_that_writes_numbers_otherwise(train, tmp_path, students, teachers):
    teacher, teachers_tokenizer = model_of(teachers, seed=1)
    learn(teacher, teachers_tokenizer, steps=300)
    known = likelihood(teacher.eval(), teachers_tokenizer)
    save_tiny(tmp_path / "teacher", teacher, teachers_tokenizer)
    student, tokenizer = model_of(students, seed=0)
    rows = Dataset.from_list([{"prompt": question, "completion": answer} for question, answer in PRODUCTS])
    trainer = train(
        model=student,
        processing_class=tokenizer,
        teacher_model=str(tmp_path / "teacher"),
        train_dataset=rows,
        objective="kd",
        lmbda=0.0,
        learning_rate=3e-3,
        per_device_train_batch_size=50,
        max_steps=300,
    )
    before = likelihood(student, tokenizer)
    trainer.train()
    after = likelihood(student.eval(), tokenizer)
    assert known > 0.95 and before < 0.05 and after > 0.95
