"""The student's moving average as the teacher: its weights by the formula, its numbers those of a model of its own."""

import copy

import pytest
import torch
from observe import LORA, logged, weights
from peft import LoraConfig
from tiny import messages_dataset, tiny_llama
from transformers import TrainerCallback

from amid_trl import AMiDConfig, AMiDTrainer


CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 2,
    "max_steps": 5,
    "logging_steps": 1,
    "learning_rate": 0.5,  # the average has to be another model soon
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "objective": "rkl",
    "max_new_tokens": 6,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "sft_weight": 1.0,  # the average of an untrained student teaches nothing
}


@pytest.fixture
def build(tmp_path, tokenizer):
    def new(folder="run", callback=None, lora=False, student=None, **settings):
        return AMiDTrainer(
            tiny_llama(tokenizer, seed=0) if student is None else student,
            args=AMiDConfig(str(tmp_path / folder), **{**CONFIG, **settings}),
            train_dataset=messages_dataset(8),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA, init_lora_weights=False) if lora else None,
            callbacks=[callback] if callback else None,
        )

    return new


class Average(TrainerCallback):
    """The formula, in float64, beside what the teacher has."""

    def __init__(self, decay):
        self.decay, self.own, self.theirs = decay, None, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.own = {name: weight.detach().double().clone() for name, weight in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, weight in model.named_parameters():
            self.own[name] = self.decay * self.own[name] + (1 - self.decay) * weight.detach().double()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.6, 1.0])
def test_the_average_is_the_formulas_and_the_teacher(build, decay, lora):
    average = Average(decay)
    trainer = build(teacher_ema=decay, callback=average, lmbda=0.0, lora=lora)
    trainer.train()
    averaged = build(teacher_ema=decay, lora=lora, folder="fresh").model.eval()  # a trained one's forward is bound
    with torch.no_grad():
        for name, weight in averaged.named_parameters():
            weight.copy_(average.own[name])
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    before = weights(trainer.model)
    states = trainer.teacher(batch)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer.model).items())
    trained = batch["labels"][:, 1:] != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        want = averaged(**inputs).logits[:, :-1][trained]
    torch.testing.assert_close(states.head(states.hidden), want, rtol=1e-4, atol=1e-5)
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-6), "at first they are one"
    moved = logged(trainer, "kl")[1:]
    assert all(kl > 1e-6 for kl in moved) if decay else moved == pytest.approx([0.0] * 4, abs=1e-6)


def test_a_frozen_average_is_a_copy_of_the_student(build, tmp_path, tokenizer):
    student = tiny_llama(tokenizer, seed=0)
    one = build(teacher_ema=1.0, lmbda=0.5, sampling_block_size=2)
    one.train()
    config = AMiDConfig(str(tmp_path / "two"), **CONFIG, lmbda=0.5, sampling_block_size=2)
    data = {"train_dataset": messages_dataset(8), "processing_class": tokenizer}
    two = AMiDTrainer(student, copy.deepcopy(student), config, **data)
    two.train()
    for name in ("loss", "kl", "grad_norm"):
        assert logged(one, name) == pytest.approx(logged(two, name), rel=1e-6, abs=1e-9), name


def test_it_begins_with_the_student_before_a_row_has_asked_it(several, pair, tokenizer):
    """The first step has rows of the other teacher alone."""
    student = tiny_llama(tokenizer)
    first = weights(student)
    rows = messages_dataset(8).add_column("teacher", ["chat"] * 2 + ["math"] * 6)
    trainer = several(
        model=student,
        train_dataset=rows,
        teacher_model={"chat": pair["chat"]},
        teachers={"math": {"teacher_ema": 1.0}, "chat": {}},
        train_sampling_strategy="sequential",
        learning_rate=0.5,
    )
    trainer.train()
    averages = trainer._parts.teachers.by_name["math"]._averages
    assert all(torch.equal(average, first[name]) for name, average in averages.items())
    assert any(not torch.equal(weight, first[name]) for name, weight in weights(trainer.model).items())


def test_a_student_in_half_precision_has_an_average_that_moves(build, tokenizer):
    """A thousandth of a step is below bfloat16's rounding of most weights."""
    student = tiny_llama(tokenizer, seed=0).to(torch.bfloat16)
    trainer = build(student=student, teacher_ema=0.999, lmbda=0.0)
    trainer.train()
    averages, own = trainer.teacher._averages, weights(trainer.model)
    for name, first in weights(tiny_llama(tokenizer, seed=0)).items():
        moved, to_move = averages[name] - first.bfloat16().float(), own[name].float() - first.bfloat16().float()
        assert averages[name].dtype == torch.float32
        assert 0 < moved.norm() < 0.01 * to_move.norm() * 5


def test_the_average_has_no_dropout(build, tokenizer):
    trainer = build(student=tiny_llama(tokenizer, seed=0, attention_dropout=0.5), teacher_ema=0.9)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.model.train()
    assert torch.equal(*(trainer.teacher(batch).hidden for _ in range(2))) and trainer.model.training


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_has_the_average_that_it_had(build, lora):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    settings = {"teacher_ema": 0.6, "save_strategy": "steps", "save_steps": 1, "lmbda": 0.0}
    settings["lora"] = lora
    whole = build(folder="whole", **settings)
    whole.train()
    build(folder="broken", callback=Stop(), **settings).train()
    resumed = build(folder="broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "kl") == logged(whole, "kl") and resumed.state.global_step == 5
    want = weights(whole.model)
    assert all(torch.equal(mine, want[name]) for name, mine in weights(resumed.model).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_ema": 1.5}, "teacher_ema must be a number in .0, 1.; got 1.5"),
        (
            {"teacher_ema": 0.9, "teacher_model_name_or_path": "x"},
            "teacher_model_name_or_path has no effect beside te",
        ),
        ({"teacher_ema": 0.9, "teacher_cache": "x", "lmbda": 0.0}, "teacher_cache has no effect beside teacher_ema"),
        ({"teacher_ema": 0.9, "seq_kd": True}, "seq_kd=True needs a teacher with a model of its own"),
    ],
)
def test_what_it_cannot_be_beside_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AMiDConfig("unused", use_cpu=True, **settings)


def test_a_teacher_beside_it_is_one_too_many(tmp_path, tokenizer, teacher):
    config = AMiDConfig(str(tmp_path), **CONFIG, teacher_ema=0.9)
    with pytest.raises(ValueError, match=r"given twice: as teacher_model and as teacher_ema=0\.9"):
        AMiDTrainer(tiny_llama(tokenizer), teacher, config, train_dataset=messages_dataset(8))
