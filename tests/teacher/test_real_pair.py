"""The real pair with teachers that are kept or read otherwise: SmolLM2-135M-Instruct, and it less six layers."""

import pytest
import torch
from datasets import Dataset
from observe import logged
from peft import LoraConfig
from real_pair import saved_teacher
from transformers import AutoModelForCausalLM

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.models.pruning import drop_layers


pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "lmbda": 0.0,
    "learning_rate": 1e-4,
    "optim": "sgd",
    "max_length": 128,
    "max_new_tokens": 16,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}
LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """Where the teacher lies, its tokenizer, and rows with a hint for the teacher."""
    place, tokenizer, rows = saved_teacher(request, tmp_path_factory.mktemp("pair"), 100, 108)
    hinted = []
    for row in rows:
        answer = row["completion"][0]["content"]
        [*before, asked] = row["prompt"]
        hint = {**asked, "content": f"{asked['content']}\nA good answer is: {answer}"}
        hinted.append({**row, "teacher_prompt": [*before, hint]})
    return place, tokenizer, hinted


def trained(pair, tmp_path, folder="run", teacher=True, hints=False, peft_config=None, **settings) -> AMiDTrainer:
    """Two epochs of eight rows in four steps; every other row is of the first teacher."""
    place, tokenizer, rows = pair
    dataset = Dataset.from_list(rows).add_column("teacher", ["first", "second"] * (len(rows) // 2))
    whole = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    trainer = AMiDTrainer(
        whole if peft_config is not None else drop_layers(whole, range(16, 22)),
        args=AMiDConfig(
            str(tmp_path / folder), teacher_model_name_or_path=place if teacher else None, **{**CONFIG, **settings}
        ),
        train_dataset=dataset if hints else dataset.remove_columns("teacher_prompt"),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def test_a_cache_that_fills_itself_is_the_teacher_in_memory(pair, tmp_path):
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_fill": True}
    memory = trained(pair, tmp_path, "memory")
    for folder in ("filling", "whole"):
        kept = trained(pair, tmp_path, folder, **cache)
        assert (kept.teacher_model is None) == (folder == "whole")
        for name in ("loss", "kl", "teacher_entropy", "grad_norm"):
            assert logged(kept, name) == pytest.approx(logged(memory, name), rel=1e-5), (folder, name)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_each_of_two_teachers_has_its_rows(pair, tmp_path, lmbda):
    """The same model twice is the one teacher; one in half precision, on the device in turn, is nearly so."""
    settings = {"lmbda": lmbda, "top_k": 1}
    one = trained(pair, tmp_path, "one", **settings)
    for dtype, rel in (("float32", 1e-4), ("bfloat16", 0.05)):
        named = {"teacher_model_name_or_path": pair[0], "teacher_offload": True}
        rounded = {**named, "teacher_model_init_kwargs": {"dtype": dtype}}
        teachers = {"first": named, "second": rounded}
        two = trained(pair, tmp_path, dtype, teacher=False, teachers=teachers, **settings)
        for name in ("loss", "kl", "teacher_entropy"):
            assert logged(two, name) == pytest.approx(logged(one, name), rel=rel), (dtype, name)
        assert len(logged(two, "kl/first")) == len(logged(two, "kl/second")) == 4
        assert two.teacher_models["second"].dtype == getattr(torch, dtype)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_the_base_with_hints_teaches_the_student_without(pair, tmp_path, lmbda):
    """On-policy or not, the base knows better with the hint, and the student follows it."""
    settings = {"teacher": False, "peft_config": LORA, "teacher_adapter_path": "base", "lmbda": lmbda}
    more = {"objective": "kd", "learning_rate": 1e-3, "optim": "adamw_torch", "num_train_epochs": 4}
    hinted = trained(pair, tmp_path, "hinted", hints=True, **settings, **more)
    plain = trained(pair, tmp_path, "plain", **settings, **more, max_steps=1)
    first, last = logged(hinted, "kl")[0], logged(hinted, "kl")[-1]
    assert logged(plain, "kl")[0] == pytest.approx(0.0, abs=1e-5), "without a hint both are one model"
    assert last < first and first > 0.05


def test_a_moving_average_follows_the_student(pair, tmp_path):
    settings = {"teacher": False, "peft_config": LORA, "teacher_ema": 0.9}
    trainer = trained(pair, tmp_path, hints=True, objective="kd", **settings)
    assert all(kl > 0 for kl in logged(trainer, "kl")) and trainer.teacher_model is None
