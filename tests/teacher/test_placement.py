"""The teacher in few bits, in the host's memory, or under an engine of its own (the engines: tests/engines)."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import messages_dataset, save_tiny, tiny_llama
from torch import nn

from amid_trl import AMiDConfig
from amid_trl.models.heads import causal_lm
from amid_trl.teacher.in_memory import HostWeights
from amid_trl.teacher.loading import _quantization
from amid_trl.teacher.placement import place


@pytest.fixture
def teacher_dir(tmp_path, tokenizer):
    teacher = tiny_llama(tokenizer, seed=1, hidden_size=64, intermediate_size=128, initializer_range=0.1)
    return save_tiny(tmp_path / "teacher", teacher, tokenizer)


def kl(trainer) -> float:
    return trainer.evaluate()["eval_kl"]


@pytest.mark.parametrize(("field", "bytes_per_weight"), [("teacher_load_in_8bit", 1), ("teacher_load_in_4bit", 0.5)])
def test_a_quantised_teacher_trains_a_student(train, teacher_dir, field, bytes_per_weight):
    rows = {"eval_dataset": messages_dataset(4), "teacher_model": str(teacher_dir)}
    trainer = train(**{field: True}, **rows)
    projection = trainer.teacher_model.model.layers[0].mlp.up_proj.weight
    assert projection.untyped_storage().nbytes() == 64 * 128 * bytes_per_weight
    assert trainer.teacher_model.lm_head.weight.dtype == torch.float32
    assert kl(trainer) == pytest.approx(kl(train(**rows)), rel=0.05)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize(("settings", "dtype"), [({"bf16": True}, torch.bfloat16), ({"bf16": False}, torch.float32)])
def test_four_bits_are_multiplied_in_the_precision_of_the_run(settings, dtype):
    args = AMiDConfig("unused", use_cpu=True, teacher_load_in_4bit=True, **settings)
    assert _quantization(args).bnb_4bit_compute_dtype == dtype


def test_a_field_and_the_kwargs_may_not_both_quantise(train, teacher_dir):
    kwargs = {"quantization_config": {"load_in_8bit": True}}
    with pytest.raises(ValueError, match="quantization is given twice"):
        train(teacher_model=str(teacher_dir), teacher_load_in_4bit=True, teacher_model_init_kwargs=kwargs)


def test_a_model_cannot_be_quantised_any_more(train):
    with pytest.raises(ValueError, match="teacher_load_in_4bit is for a teacher given by name"):
        train(teacher_load_in_4bit=True)


def places(model) -> list[int]:
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


def test_weights_visit_the_device_and_go_home(teacher):
    at_home, values = places(teacher), {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    home = HostWeights(teacher, torch.device("cpu"))
    with home.on_device():
        assert not set(places(teacher)) & set(at_home)
        torch.testing.assert_close(teacher.state_dict(), values, rtol=0, atol=0)
        kept = teacher.lm_head.weight.detach()
    assert places(teacher) == at_home
    assert kept.data_ptr() not in at_home
    torch.testing.assert_close(kept, values["lm_head.weight"], rtol=0, atol=0)


def test_weights_go_home_after_an_error(teacher):
    at_home, home = places(teacher), HostWeights(teacher, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="out of memory"), home.on_device():
        raise RuntimeError("out of memory")
    assert places(teacher) == at_home


def test_an_offloaded_teacher_gives_the_numbers_of_one_that_stays(train, student, teacher, monkeypatch):
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    def losses(**settings) -> list[float]:
        student.load_state_dict(start)
        trainer = train(**settings)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]

    visits = []
    visit = HostWeights.on_device
    monkeypatch.setattr(HostWeights, "on_device", lambda self: visits.append(causal_lm(teacher)) or visit(self))
    assert losses(teacher_offload=True) == losses()
    assert len(visits) == 2


ON_DISK = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}


def test_the_head_stays_on_the_device_for_the_loss(train, teacher):
    trainer = train(teacher_offload=True)
    states = trainer.teacher(next(iter(trainer.get_train_dataloader())))
    assert states.head.weight.data_ptr() not in places(teacher)


def test_a_teacher_that_is_split_over_devices_stays_where_it_was_loaded(train, teacher_dir, tmp_path):
    kwargs = {"device_map": {**ON_DISK, "lm_head": "cpu"}, "offload_folder": str(tmp_path / "offloaded")}
    rows = {"eval_dataset": messages_dataset(4), "teacher_model": str(teacher_dir)}
    trainer = train(teacher_model_init_kwargs=kwargs, **rows)
    assert trainer.teacher_model.model.layers[0].mlp.up_proj.weight.is_meta
    assert kl(trainer) == pytest.approx(kl(train(**rows)), rel=1e-6)
    trainer.train()


def test_a_head_that_is_offloaded_is_refused(train, teacher_dir, tmp_path):
    kwargs = {"device_map": {**ON_DISK, "lm_head": "disk"}, "offload_folder": str(tmp_path / "offloaded")}
    with pytest.raises(ValueError, match="the head of LlamaForCausalLM is offloaded"):
        train(teacher_model=str(teacher_dir), teacher_model_init_kwargs=kwargs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_load_in_8bit": True, "teacher_load_in_4bit": True}, "exclude each other"),
        ({"teacher_offload": True, "teacher_load_in_4bit": True}, "exclude each other"),
        (
            {"teacher_offload": True, "teacher_model_init_kwargs": {"device_map": "auto"}},
            "teacher_offload and device_map",
        ),
        ({"teacher_offload": True, "seq_kd": True}, "which teacher_offload does not support"),
        ({"teacher_deepspeed": {}, "seq_kd": True}, "which teacher_deepspeed does not support"),
        ({"teacher_offload": True, "teacher_adapter_path": "base"}, "teacher_offload has no effect"),
        ({"nonfinite_loss": "ignore"}, "nonfinite_loss must be 'stop' or 'skip'"),
    ],
)
def test_what_contradicts_itself_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AMiDConfig("unused", use_cpu=True, **settings)


@pytest.mark.parametrize(("plugin", "message"), [(object(), "without DeepSpeed"), (None, "without FSDP")])
def test_an_offloaded_teacher_is_for_data_parallelism(plugin, message):
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), is_fsdp2=True)
    args: Any = SimpleNamespace(teacher_deepspeed=None, teacher_offload=True)
    with pytest.raises(ValueError, match=message):
        place(nn.Linear(1, 1), args, accelerator)


@pytest.mark.parametrize("stage", [None, 0, 2, 3])
def test_a_teachers_engine_is_read_from_a_file_and_trains_nothing(monkeypatch, tmp_path, teacher, stage):
    deepspeed = pytest.importorskip("deepspeed")
    seen = {}
    monkeypatch.setattr(deepspeed, "initialize", lambda model, config: (seen.update(config) or model,))
    given = {"optimizer": {"type": "AdamW"}, "train_batch_size": "auto"}
    given |= {} if stage is None else {"zero_optimization": {"stage": stage}}
    (tmp_path / "teacher.json").write_text(json.dumps(given))
    args: Any = SimpleNamespace(
        teacher_deepspeed=str(tmp_path / "teacher.json"), per_device_train_batch_size=4, padding_free=False
    )
    accelerator: Any = SimpleNamespace()
    place(teacher, args, accelerator)
    assert "optimizer" not in seen and seen["zero_optimization"]["stage"] == (3 if stage == 3 else 0)
