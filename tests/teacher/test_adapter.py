"""Teacher and student as adapters of one base: the numbers of two models, in the memory of one."""

import copy
from pathlib import Path

import pytest
import torch
from observe import LORA, Windows, completions_of, logged, weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import messages_dataset, tiny_llama

from amid_trl import AMiDConfig
from amid_trl.data.batches import row_key
from amid_trl.teacher.cache import TeacherCache
from amid_trl.training.fill_cache import cache_teacher


@pytest.fixture
def base(tokenizer):
    return tiny_llama(tokenizer, seed=4)


@pytest.fixture
def adapter(tmp_path, base) -> str:
    """A teacher's adapter of the base, as somebody has saved it; its dropout must not be felt."""
    config = LoraConfig(**{**LORA, "r": 2, "lora_dropout": 0.5}, init_lora_weights=False)
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


STUDENT = LoraConfig(**LORA, init_lora_weights=False)


@pytest.fixture
def run(train, base):
    def build(teacher_model, **settings):
        return train(
            model=copy.deepcopy(base),
            teacher_model=teacher_model,
            has_teacher=teacher_model is not None,
            peft_config=STUDENT,
            eval_dataset=messages_dataset(2),
            eval_strategy="steps",
            eval_steps=2,
            **{"max_steps": 4, **settings},
        )

    return build


SETTINGS = [
    {"lmbda": 0.0},
    {"lmbda": 1.0},
    {"lmbda": 0.0, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    {"lmbda": 0.0, "objective": "taid", "assistant_lambda_schedule": {"kind": "taid"}},
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("teacher", ["adapter", "base"])
def test_an_adapter_of_the_students_base_is_a_teacher_of_its_own(run, base, adapter, tokenizer, teacher, settings):
    path = adapter if teacher == "adapter" else "base"
    one = run(None, teacher_adapter_path=path, **settings)
    separate = copy.deepcopy(base)
    two = run(PeftModel.from_pretrained(separate, adapter) if teacher == "adapter" else separate, **settings)
    mine, theirs = Windows(one), Windows(two)
    one.train()
    two.train()
    for name in ("loss", "grad_norm", "kl", "teacher_entropy", "eval_loss", "eval_kl"):
        assert logged(one, name) == pytest.approx(logged(two, name), rel=1e-5), name
    assert [completions_of(window) for window in mine.windows] == [completions_of(window) for window in theirs.windows]
    trained = weights(two.model)
    for name, weight in weights(one.model).items():
        if ".teacher." not in name:
            torch.testing.assert_close(weight, trained[name], rtol=1e-5, atol=1e-7)


def test_only_the_students_adapter_is_trained_and_the_base_is_there_once(run, base, adapter):
    trainer = run(None, teacher_adapter_path=adapter)
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, weight in weights(trainer.model).items() if not torch.equal(weight, before[name])}
    assert changed and all(".default." in name for name in changed)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable == changed
    shared = [name for name in before if "lora" not in name]
    assert sum(before[name].numel() for name in shared) == sum(p.numel() for p in base.parameters())


def test_a_checkpoint_holds_the_student_alone_and_is_resumed(run, tmp_path, adapter):
    saving = {"save_strategy": "steps", "save_steps": 2, "teacher_adapter_path": adapter}
    whole = run(None, **saving, output_dir=str(tmp_path / "whole"))
    whole.train()
    whole.save_model()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    for folder in (checkpoint, tmp_path / "whole"):
        assert not (folder / "teacher").exists()
        names = list(load_file(folder / "adapter_model.safetensors"))
        assert not [name for name in names if "teacher" in name]
    resumed = run(None, **saving, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    want = weights(whole.model)
    assert all(torch.equal(weight, want[name]) for name, weight in weights(resumed.model).items())


def test_what_it_expects_can_be_cached(run, base, adapter, tmp_path):
    caches = []
    for name, teacher, settings in (
        ("one", None, {"teacher_adapter_path": adapter}),
        ("two", PeftModel.from_pretrained(copy.deepcopy(base), adapter), {}),
    ):
        trainer = run(teacher, **settings)
        cache_teacher(trainer, str(tmp_path / name), 12, "float32")
        caches.append(TeacherCache(tmp_path / name))
    one, two = caches
    assert one.teacher == adapter and len(one) == len(two) == 8
    for row in trainer.train_dataset:
        key = row_key(row["input_ids"], row["labels"])
        torch.testing.assert_close(tuple(one.row(key)), tuple(two.row(key)))


def test_a_student_without_an_adapter_is_refused(train, adapter):
    with pytest.raises(ValueError, match="needs a student with an adapter; pass peft_config"):
        train(has_teacher=False, teacher_adapter_path=adapter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_model_name_or_path": "x"}, "teacher_model_name_or_path has no effect beside teacher_adapter_path"),
        ({"teacher_cache": "x", "lmbda": 0.0}, "teacher_cache has no effect beside teacher_adapter_path"),
        ({"seq_kd": True}, "needs a teacher with a model of its own"),
    ],
)
def test_what_would_be_a_second_teacher_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AMiDConfig(output_dir="unused", use_cpu=True, teacher_adapter_path="base", **settings)


def test_the_path_of_an_adapter_that_is_not_there_is_an_error(run, tmp_path):
    with pytest.raises((ValueError, OSError), match="nowhere"):
        run(None, teacher_adapter_path=str(Path(tmp_path, "nowhere")))


def test_a_students_adapter_may_not_have_the_teachers_name(train, base, adapter):
    named = get_peft_model(base, STUDENT, adapter_name="teacher")
    with pytest.raises(ValueError, match="the student has an adapter called 'teacher'"):
        train(model=named, has_teacher=False, teacher_adapter_path=adapter)
