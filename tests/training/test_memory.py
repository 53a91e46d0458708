"""What is said of memory is what the tensors take: counted by hand, after real steps, and in sharded processes."""

import json
import os
import re
import shutil
from importlib.util import find_spec

import memory_worker
import pytest
import torch
from observe import LORA, logged
from peft import LoraConfig
from processes import run_ranks
from small_tokenizers import special_first
from tiny import save_tiny, tiny_llama
from torch import nn
from transformers import TrainerCallback

from amid_trl.models.vocabulary import first_tokens
from amid_trl.training.memory import (
    GIB,
    MIB,
    _elements,
    _moments,
    _size,
    expected_gradients,
    expected_optimizer_state,
    held,
    optimizer_state,
    weights,
)


def llama_weights(vocab: int, matrices: int, width: int = 32) -> int:
    """Those of `tiny_llama`, with so many matrices of the vocabulary."""
    attention, mlp, norms = 2 * width * width + 2 * width * width // 2, 3 * 64 * width, 2 * width
    return 2 * (attention + mlp + norms) + width + matrices * vocab * width


def buffers(model: nn.Module) -> int:
    return sum(buffer.nbytes for buffer in model.buffers())


def total(found: dict) -> int:
    return sum(found.values())


@pytest.mark.parametrize(("tied", "matrices"), [(False, 2), (True, 1)])
def test_a_tied_head_counts_once(tokenizer, tied, matrices):
    model = tiny_llama(tokenizer, tie_word_embeddings=tied)
    assert total(weights(model)) == 4 * llama_weights(len(tokenizer), matrices) + buffers(model)


def test_a_view_counts_as_what_it_keeps_in_memory():
    whole = torch.zeros(100)
    assert total(held([whole[:10], whole[50:].view(5, 10), torch.zeros(3, dtype=torch.bfloat16)])) == 400 + 6


def test_weights_of_four_bits_count_with_their_scales():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compress_statistics=False).to("cpu")
    assert layer.weight.quant_state.blocksize == 64
    assert total(weights(layer)) == 64 * 64 // 2 + 4 * 64 + 4 * 16  # a scale for each block; the sixteen values
    assert _elements(layer.weight) == 64 * 64


class Gradients(TrainerCallback):
    """Their bytes, just before each step of the optimizer."""

    def __init__(self):
        self.bytes = []

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        self.bytes.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_a_student_is_its_weights_their_gradients_and_two_moments(train, student, peft_config):
    before = 4 * sum(p.numel() for p in student.parameters()) + buffers(student)
    trainer = train(optim="adamw_torch", peft_config=peft_config)
    trainer.add_callback(gradients := Gradients())
    trainer.train()

    model, optimizer = trainer.model, trainer.optimizer
    tensors = [p for p in model.parameters() if p.requires_grad]
    trained = sum(p.numel() for p in tensors)
    assert total(weights(model)) == before + (0 if peft_config is None else 4 * trained)
    assert gradients.bytes == [4 * trained] * 2
    assert expected_gradients(model, trainer.accelerator) == 4 * trained
    assert total(optimizer_state(optimizer, model)) == 2 * 4 * trained + 4 * len(tensors)  # each counts its steps
    assert expected_optimizer_state(optimizer, model, trainer.accelerator) == 2 * 4 * trained
    everything = total(weights(model)) + 4 * trained + total(optimizer_state(optimizer, model))
    assert logged(trainer, "memory/student_gib") == pytest.approx([everything / GIB] * 2)


def test_a_bfloat16_teacher_takes_half(train, teacher):
    trainer = train(teacher_model=teacher.bfloat16())
    trainer.train()
    takes = 2 * sum(p.numel() for p in teacher.parameters()) + buffers(teacher)
    assert logged(trainer, "memory/teacher_gib") == pytest.approx([takes / GIB] * 2)
    assert "memory/peak_gib" not in trainer.state.log_history[0]  # CUDA's


def test_a_shared_base_is_the_students(train, student):
    base = total(weights(student))
    trainer = train(has_teacher=False, teacher_adapter_path="base", peft_config=LoraConfig(**LORA))
    trainer.train()
    adapter = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert total(weights(trainer.model)) == base + 4 * adapter
    assert logged(trainer, "memory/student_gib") and not logged(trainer, "memory/teacher_gib")


# ---- The table ----


def rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^  (\S.*?)  +([\d.]+ [MG]iB|unknown)  ", text, re.MULTILINE))


def mib(count: int) -> str:
    return f"{count / MIB:.2f} MiB"


def test_the_table_is_printed_when_training_begins(train, student, teacher, capsys):
    trainer = train(optim="adamw_torch", logits_chunk_size=4096)
    assert "Memory" not in capsys.readouterr().out
    trainer.train()
    printed = capsys.readouterr().out
    trained, of_teacher = (sum(p.numel() for p in model.parameters()) for model in (student, teacher))
    assert rows(printed) == {
        "student": mib(total(weights(student))),
        "its gradients": mib(4 * trained),
        "its optimizer state": mib(8 * trained),
        "teacher": mib(total(weights(teacher))),
        "a chunk of logits": mib(4096 * 360 * (4 + 4)),
    }
    assert f" {trained:,} parameters\n" in printed and f" {of_teacher:,} parameters\n" in printed


@pytest.mark.parametrize(
    ("settings", "bytes_per_logit"),
    [
        ({"bf16": True}, 2 + 2),
        ({"has_teacher": False, "teacher_adapter_path": "base", "peft_config": LoraConfig(**LORA)}, 4 + 4),
    ],
    ids=["autocast", "shared base"],
)
def test_logits_of_both_models_have_the_dtype_of_their_products(train, capsys, settings, bytes_per_logit):
    trainer = train(logits_chunk_size=4096, max_steps=1, **settings)
    trainer.train()
    assert rows(capsys.readouterr().out)["a chunk of logits"] == mib(4096 * 360 * bytes_per_logit)
    trainer._parts.memory._vocabularies = {}  # as of a cache, from which come no logits
    assert rows(trainer._parts.memory.table(trainer.args))["a chunk of logits"] == mib(
        4096 * 360 * bytes_per_logit // 2
    )


@pytest.mark.parametrize("student_has", [330, 483])
def test_logits_of_two_vocabularies_are_those_of_both(train, tmp_path, capsys, student_has):
    """Projected are as many tokens at a time as the larger one allows."""
    large = special_first()
    small = first_tokens(large, 330).tokenizer
    assert (len(small), len(large)) == (330, 483)
    tokenizer, others = (small, large) if student_has == 330 else (large, small)
    save_tiny(tmp_path / "teacher", tiny_llama(others, vocab_size=500), others)
    given = {"model": tiny_llama(tokenizer), "processing_class": tokenizer, "max_steps": 1}
    train(**given, teacher_model=str(tmp_path / "teacher")).train()
    printed, tokens = capsys.readouterr().out, 24 * 2**20 // 483
    assert rows(printed)["a chunk of logits"] == mib(tokens * (330 + 483) * 4)
    assert f"at most {tokens:,} tokens at a time" in printed


@pytest.mark.parametrize(
    ("optim", "state"), [("sgd", "0.00 MiB"), ("adamw_torch", mib(8 * 41632)), ("adafactor", "unknown")]
)
def test_what_an_optimizer_will_hold_is_said_where_it_is_known(train, capsys, optim, state):
    train(optim=optim, max_steps=1).train()
    assert rows(capsys.readouterr().out)["its optimizer state"] == state


def test_a_momentum_is_a_number_for_every_weight():
    weight = torch.nn.Parameter(torch.ones(1))
    assert [_moments(torch.optim.SGD([weight], 0.1, momentum=momentum)) for momentum in (0.0, 0.9)] == [0, 1]


def test_sizes_are_said_in_the_unit_that_suits_them():
    assert [_size(count) for count in (2**20, 2**30 - 2**20, 5 * 2**29)] == ["1.00 MiB", "1023.00 MiB", "2.50 GiB"]


# ---- Two processes ----


@pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="needs the extra `deepspeed` and a C++ compiler",
)
def test_every_process_holds_what_its_engine_leaves_it(tmp_path):
    memory_worker.save_models(tmp_path / "models")
    one = memory_worker.measured(memory_worker.trained(tmp_path / "models", tmp_path / "one"))
    (tmp_path / "two").mkdir()
    folders = [str(tmp_path / "models"), str(tmp_path / "two")]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    run_ranks("memory_worker", *folders, environment=environment, processes=2, timeout=240)

    trained = llama_weights(360, 2, width=64)
    # Numbers of every trained weight that a process holds: of weights, gradients, moments with ZeRO's copy.
    shares = {"ddp": (1, 1, 2), "zero1": (1, 1, 3 / 2), "zero2": (1, 1 / 2, 3 / 2), "zero3": (1 / 2, 1 / 2, 3 / 2)}
    for file in sorted((tmp_path / "two").glob("rank*.json")):
        rank = json.loads(file.read_text())
        for engine, (of_weights, of_gradients, of_optimizer) in shares.items():
            found = rank[engine]
            assert found["student"] == pytest.approx(of_weights * one["student"], rel=0.01), engine
            assert found["teacher"] == pytest.approx(of_weights * one["teacher"], rel=0.01), engine
            assert found["expected_gradients"] == pytest.approx(4 * of_gradients * trained), engine
            assert found["optimizer"] == pytest.approx(4 * of_optimizer * trained, rel=0.01), engine
            assert found["expected_optimizer"] == pytest.approx(4 * of_optimizer * trained), engine
            everything = found["student"] + found["expected_gradients"] + found["optimizer"]
            assert found["logged"]["memory/student_gib"] == pytest.approx(everything / GIB), engine
            assert found["logged"]["memory/teacher_gib"] == pytest.approx(found["teacher"] / GIB), engine
        assert rank["shard"] == 8 * 4 * 4 // 2
        assert rank["uneven"]["memory/teacher_gib"] == pytest.approx(8 * MIB / GIB)  # that of the fuller process
