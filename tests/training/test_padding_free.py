"""`padding_free=True` and `packing=True`: the numbers of padded rows, without their padding."""

import pytest
import torch
from datasets import Dataset
from families import family_model
from observe import LORA, Windows, completions_of, logged, same_runs
from peft import LoraConfig
from tiny import QUESTIONS, messages_dataset, multi_turn_dataset, tiny_gpt2, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from amid_trl.data.packing import PACKED_ROWS
from amid_trl.models.packing import PackedRows
from amid_trl.training.fill_cache import cache_teacher


# Plain descent: Adam makes a step of one size out of any gradient, also of one that is rounding alone.
DESCENT = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 2}
TEXTS = [row["messages"] for row in (*messages_dataset(6), *multi_turn_dataset(4))]  # 24 to 75 tokens
ROWS = Dataset.from_list([{"messages": messages} for messages in TEXTS])


@pytest.fixture
def run(train, tokenizer):
    """A run on rows of many lengths that has been evaluated too."""

    def build(padding_free=False, kind="llama", **settings):
        given = {"eval_dataset": messages_dataset(3), "train_dataset": ROWS, **DESCENT, **settings}
        trainer = train(model=MODELS[kind](tokenizer), padding_free=padding_free, **given)
        trainer.train()
        trainer.evaluate()
        return trainer

    return build


@pytest.fixture
def read(monkeypatch):
    """How many tokens models are given in packed rows, and how many of them are of a row; not those of the check."""
    seen = []
    at = PackedRows.at

    def noted(self, places, values):
        seen.append((self.input_ids.numel(), int(self.shown.sum())))
        return at(self, places, values)

    monkeypatch.setattr(PackedRows, "at", noted)
    return seen


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
SETTINGS = [
    {"gradient_accumulation_steps": 3, "gradient_checkpointing": True},
    {"lmbda": 1.0, "top_k": 1, "per_device_train_batch_size": 4},
    {"kind": "gpt2", "per_device_train_batch_size": 4, "sft_weight": 0.5, "logits_chunk_size": 3},
    {"objective": "taid", "assistant_lambda_schedule": {"kind": "taid"}, "per_device_train_batch_size": 4},
    {"has_teacher": False, "teacher_ema": 0.5, "sft_weight": 1.0, "per_device_train_batch_size": 4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_numbers_are_those_of_padded_rows(run, read, settings):
    padded = run(**settings)
    assert not read
    same_runs(run(padding_free=True, **settings), padded)
    assert read and all(count <= 1.4 * tokens for count, tokens in read)


@pytest.mark.parametrize("written", ["likeliest tokens", "hidden states"])
def test_cached_teachers_are_those_of_padded_rows(run, train, teacher, tmp_path, written):
    folder = str(tmp_path / "cache")
    caching = train(train_dataset=ROWS, eval_dataset=messages_dataset(3), padding_free=True)
    caching.args.teacher_cache_states = written == "hidden states"
    cache_teacher(caching, folder, 20, "float32")
    settings = {"teacher_cache": folder, "per_device_train_batch_size": 4, "has_teacher": False}
    if written == "likeliest tokens":
        settings["teacher_top_k"] = 20
    same_runs(run(padding_free=True, **settings), run(**settings))


def test_a_teachers_own_prompts_are_read_without_padding(run, read):
    asked = [[{"role": "user", "content": question}] for question, _ in QUESTIONS]
    hinted = [
        [{"role": "user", "content": n * "It is short. " + question}] for n, (question, _) in enumerate(QUESTIONS)
    ]
    answers = [[{"role": "assistant", "content": answer}] for _, answer in QUESTIONS]
    rows = Dataset.from_dict({"prompt": asked, "completion": answers, "teacher_prompt": hinted})
    settings = {"train_dataset": rows, "eval_dataset": rows.select([0, 5]), "per_device_train_batch_size": 4}
    same_runs(run(padding_free=True, **settings), run(**settings))
    assert len({tokens for _, tokens in read}) > len(read) / 2  # the teacher's rows are others


def test_an_adapter_as_the_teacher_is_read_without_padding(run, read):
    lora = LoraConfig(**LORA, init_lora_weights=False)
    settings = {"has_teacher": False, "teacher_adapter_path": "base", "peft_config": lora, "learning_rate": 1e-2}
    padded, free = (run(padding_free=way, per_device_train_batch_size=4, **settings) for way in (False, True))
    assert logged(free, "loss") == pytest.approx(logged(padded, "loss"), rel=1e-5)
    assert logged(free, "grad_norm") == pytest.approx(logged(padded, "grad_norm"), rel=1e-5)
    assert len(read) == 2 * 2 + 2  # both models in two steps, and in an evaluation of one batch


@pytest.mark.parametrize("rows", [1, 4])
def test_experts_are_balanced_as_ever(train, tokenizer, rows):
    def balanced(padding_free):
        models = {
            name: family_model("mixtral", tokenizer, seed=i) for i, name in enumerate(("model", "teacher_model"))
        }
        split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 4 // rows}
        given = {**DESCENT, **split, "max_steps": 1, "router_aux_loss_coef": 0.5, "learning_rate": 1e-2}
        trainer = train(**models, train_dataset=ROWS, padding_free=padding_free, **given)
        trainer.train()
        return trainer

    free, padded = balanced(True), balanced(False)
    assert logged(free, "aux_loss") == pytest.approx(logged(padded, "aux_loss"), rel=1e-5)
    same_runs(free, padded)


class MostTokens(TorchDispatchMode):
    """Remembers the most tokens, rows of a tensor of more than one dimension, that any operation gave something of."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.is_floating_point():
                self.count = max(self.count, tensor.numel() // max(1, tensor.shape[-1]))
        return result


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_nothing_has_an_entry_for_padding(train, tokenizer, kind):
    """One long row and many short ones, which padded have twenty times the tokens."""
    lengths = [512, *([4] * 60)]
    rows = [
        {"input_ids": [5] * n, "labels": [-100] * (n // 2) + [5] * (n - n // 2), "prompt_ids": [5]} for n in lengths
    ]
    models = {name: family_model(kind, tokenizer, seed=i) for i, name in enumerate(("model", "teacher_model"))}
    given = {"per_device_train_batch_size": len(rows), "max_steps": 1, "gradient_accumulation_steps": 1}
    if kind == "mixtral":
        given["router_aux_loss_coef"] = 0.5
    counts = {}
    for padding_free in (True, False):
        trainer = train(**models, train_dataset=Dataset.from_list(rows), padding_free=padding_free, **given)
        with MostTokens() as most:
            trainer.train()
        counts[padding_free] = most.count
    assert counts[True] < len(rows) * max(lengths) / 4 < len(rows) * max(lengths) <= counts[False]


def test_a_window_is_dealt_into_batches_of_like_size(train):
    sizes = {}
    for padding_free in (False, True):
        trainer = train(train_dataset=ROWS, padding_free=padding_free, gradient_accumulation_steps=3, max_steps=1)
        seen = Windows(trainer)
        trainer.train()
        [(batches, _)] = seen.windows
        assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 2]
        sizes[padding_free] = [int(batch["attention_mask"].sum()) for batch in batches]
    assert sum(sizes[True]) == sum(sizes[False])
    assert max(sizes[True]) - min(sizes[True]) < (max(sizes[False]) - min(sizes[False])) / 2


def test_a_model_that_does_not_tell_rows_apart_is_refused_by_name(train, tokenizer):
    model = family_model("opt", tokenizer)
    with pytest.raises(ValueError, match="but the student, a OPTForCausalLM, does not tell rows apart"):
        train(model=model, padding_free=True)
    with pytest.raises(ValueError, match="but the teacher, a OPTForCausalLM, does not tell rows apart"):
        train(teacher_model=model, packing=True)
    train(teacher_model=model)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("family", "is_refused"), [("opt", True), ("llama", False)])
def test_a_student_that_does_not_run_when_it_is_given_is_tried_before_the_first_step(
    train, tokenizer, family, is_refused, bf16
):
    def on_no_device_yet(*_):
        raise RuntimeError("flash attention does not run here")

    model = family_model(family, tokenizer)
    before = [weight.clone() for weight in model.parameters()]
    here = model.get_input_embeddings().register_forward_pre_hook(on_no_device_yet)
    trainer = train(model=model, padding_free=True, bf16=bf16)
    here.remove()
    if is_refused:
        with pytest.raises(ValueError, match="but the student, a OPTForCausalLM, does not tell rows apart"):
            trainer.train()
    else:
        trainer.train()
    assert is_refused == all(map(torch.equal, model.parameters(), before))


def test_an_offloaded_teacher_that_runs_on_the_device_alone_is_tried_there(train, tokenizer):
    model = family_model("opt", tokenizer)
    at_home = model.get_input_embeddings().weight.data_ptr()

    def away_from_home(embeddings, _):
        if embeddings.weight.data_ptr() == at_home:
            raise RuntimeError("flash attention does not run here")

    model.get_input_embeddings().register_forward_pre_hook(away_from_home)
    with pytest.raises(ValueError, match="but the teacher, a OPTForCausalLM, does not tell rows apart"):
        train(teacher_model=model, teacher_offload=True, padding_free=True)


# ---- packing ----


def test_packed_rows_of_a_window_have_the_numbers_of_the_same_rows(run, read):
    packed = run(packing=True, max_length=110, per_device_train_batch_size=10, max_steps=1)
    lengths = [[len(row["input_ids"]) for row in members] for members in packed.train_dataset[PACKED_ROWS]]
    assert sum(map(len, lengths)) == 10 > len(lengths) and all(sum(members) <= 110 for members in lengths)
    assert read and packed.args.padding_free and packed.args.packing
    same_runs(packed, run(per_device_train_batch_size=10, max_steps=1, max_length=110))


def test_a_packed_row_counts_as_one(train):
    trainer = train(packing=True, max_length=110, train_dataset=ROWS, per_device_train_batch_size=1, max_steps=...)
    seen = Windows(trainer)
    trainer.train()
    windows = [[len(row) for batch in batches for row in batch["input_ids"]] for batches, _ in seen.windows]
    assert len(trainer.train_dataset) < len(ROWS)
    assert len(windows) == 3 * len(trainer.train_dataset)  # epochs
    assert sum(map(len, windows)) == 3 * len(ROWS)


def test_the_student_writes_to_every_prompt_of_a_packed_row(train):
    given = {"max_length": 110, "train_dataset": ROWS, "per_device_train_batch_size": 1, "num_train_epochs": 1}
    trainer = train(packing=True, lmbda=1.0, max_steps=..., **given)
    seen = Windows(trainer)
    trainer.train()
    assert set(seen.sources) == {"student"}
    assert sum(len(completions_of(window)) for window in seen.windows) == len(ROWS)
    for [batch], _ in seen.windows:
        assert int(batch["attention_mask"].sum()) <= 110


def test_a_packed_run_resumes(train, tokenizer, tmp_path):
    def packed(folder, resume=None):
        given = {"packing": True, "max_length": 110, "train_dataset": ROWS, "per_device_train_batch_size": 1}
        given |= {**DESCENT, "max_steps": 3}
        saving = {"output_dir": str(tmp_path / folder), "save_strategy": "steps", "save_steps": 2}
        trainer = train(model=tiny_llama(tokenizer), **given, **saving)
        trainer.train(resume)
        return trainer

    whole = packed("whole")
    resumed = packed("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_a_cache_knows_the_rows_of_a_packed_dataset(train, tokenizer, tmp_path):
    given = {"packing": True, "max_length": 110, "train_dataset": ROWS, "num_train_epochs": 2, "max_steps": ...}
    filling = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_fill": True}
    trainer = train(model=tiny_llama(tokenizer), **given, **filling)
    trainer.train()
    again = train(model=tiny_llama(tokenizer), **given, **filling)
    assert type(again.teacher).__name__ == "FillingTeacher"
    read = train(model=tiny_llama(tokenizer), has_teacher=False, teacher_cache=str(tmp_path / "cache"), **given)
    read.train()
    assert logged(read, "loss") == pytest.approx(logged(trainer, "loss"), rel=1e-4)
    other = Dataset.from_list(
        [*ROWS, {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}]
    )
    with pytest.raises(ValueError, match="1 of 11 rows of the train dataset are not in the teacher's cache"):
        train(has_teacher=False, teacher_cache=str(tmp_path / "cache"), **{**given, "train_dataset": other})


def test_a_broken_row_of_a_packed_one_is_named(train, student, tokenizer):
    with torch.no_grad():
        student.model.embed_tokens.weight[tokenizer(" cold")["input_ids"][-1]] = float("nan")
    trainer = train(packing=True, max_length=110, train_dataset=ROWS, per_device_train_batch_size=10, max_steps=1)
    with pytest.raises(FloatingPointError, match=r"row \d+ \('<\|im_start\|>user\\nIs fire cold"):
        trainer.train()


REFUSED = [
    ({"packing": True, "max_length": None}, "packing=True fills rows up to max_length tokens; set max_length"),
    ({"packing": True, "train_sampling_strategy": "group_by_length"}, "packing=True leaves rows of one length"),
    ({"packing": True, "packing_strategy": "bfd_split"}, "does not support packing_strategy='bfd_split'"),
    ({"packing": True, "num_generations": 2, "lmbda": 1.0}, "packing=True leaves open how many rows a window has"),
    (
        {"padding_free": True, "pad_to_multiple_of": 8},
        "pad_to_multiple_of=8 pads rows, and padding_free=True trains",
    ),
    ({"packing": True, "dataset_kwargs": {"skip_prepare_dataset": True}}, "packing=True fills the rows that are"),
    ({"packing": True, "data_collator": list}, "packing=True fills the rows that are prepared here"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_what_cannot_be_packed_is_refused_with_the_reason(train, settings, message):
    with pytest.raises(ValueError, match=message):
        train(**settings)


def test_a_collator_of_ones_own_may_be_read_without_padding(train, student):
    trainer = train(train_dataset=ROWS, per_device_train_batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    left = {
        name: torch.stack(
            [row.roll(int((1 - mask).sum())) for row, mask in zip(batch[name], batch["attention_mask"], strict=False)]
        )
        for name in ("input_ids", "labels", "attention_mask")
    }
    want = trainer.compute_loss(trainer.model, batch)
    free = train(data_collator=lambda rows: left, padding_free=True, train_dataset=ROWS)
    torch.testing.assert_close(free.compute_loss(free.model, left), want)
