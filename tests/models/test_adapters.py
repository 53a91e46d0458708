"""Every adapter that PEFT has for causal LMs trains, and is the same model again when it is loaded, or is refused."""

import copy
from typing import get_args, get_type_hints

import peft
import pytest
import torch
from observe import LORA, dense_loss, logged, weights
from peft import AutoPeftModelForCausalLM, LoftQConfig, LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import messages_dataset, save_tiny, tiny_llama, tiny_tokenizer

from amid_trl.models.loading import load_causal_lm
from amid_trl.models.merging import merged_model


IDS = torch.arange(3, 9)[None]
# What a type needs beside, or in place of, the layers that it adapts.
OWN = {
    "ADALORA": {"total_step": 6, "tinit": 1, "tfinal": 1},
    "ADAPTION_PROMPT": {"target_modules": None, "adapter_len": 4, "adapter_layers": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": None, "token_indices": [1, 2]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 50},
}
PROMPTS = ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
FORWARDS = ("POLY", "SHADOW", "XLORA")
NEWER_TYPES = {"CARTRIDGE", "SHADOW"}  # than the oldest PEFT that is admitted
TYPES = {str(kind).rpartition(".")[-1]: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning:peft")


def adapter_of(kind: str, **settings):
    """An adapter of that type on some layers."""
    config, own = TYPES[kind], {**OWN.get(kind, {}), **settings}
    if kind in PROMPTS:
        own = {} if kind == "CPT" else {"num_virtual_tokens": 4}
    elif "target_modules" not in own:
        own["target_modules"] = ["q_proj", "v_proj", "up_proj"]
    return config(task_type="CAUSAL_LM", **{name: value for name, value in own.items() if value is not None})


@pytest.fixture
def base(tmp_path, tokenizer) -> str:
    return str(save_tiny(tmp_path / "base", tiny_llama(tokenizer, seed=2), tokenizer))


def reloaded(path) -> torch.Tensor:
    """Its logits after other draws than those that made it."""
    torch.manual_seed(99)
    return load_causal_lm(str(path), {"dtype": "float32"}, distributed=False).eval()(IDS).logits.detach()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", sorted(set(TYPES) - {*PROMPTS, *FORWARDS}))
def test_an_adapter_of_any_type_trains_and_is_loaded_as_it_was(train, tmp_path, base, kind):
    try:
        config = adapter_of(kind)
    except ImportError as error:
        pytest.skip(str(error))
    settings = {"max_steps": 6, "learning_rate": 5e-2, "per_device_train_batch_size": 8}
    trainer = train(model=base, peft_config=config, lr_scheduler_type="constant", **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        trainer.model.eval()
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), dense_loss(trainer, batch))
        trainer.model.train()
    before = weights(trainer.model)
    trainer.train()
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trained and all(not torch.equal(before[n], w) for n, w in weights(trainer.model).items() if n in trained)
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    trainer.save_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(reloaded(tmp_path / "adapter"), trainer.model.eval()(IDS).logits)


@pytest.mark.parametrize("kind", [kind for kind in PROMPTS if kind in TYPES])
def test_virtual_tokens_are_refused(train, kind):
    with pytest.raises(ValueError, match=rf"the student uses a prompt-learning adapter \({TYPES[kind].__name__}\)"):
        train(peft_config=adapter_of(kind))


@pytest.mark.parametrize("kind", [kind for kind in FORWARDS if kind in TYPES])
def test_an_adapter_with_a_forward_of_its_own_is_refused(train, student, kind):
    config = adapter_of(
        kind, **({"adapters": {}, "hidden_size": 32, "target_modules": None} if kind == "XLORA" else {})
    )
    with pytest.raises(ValueError, match=f"the student uses an adapter of the type {kind}"):
        train(peft_config=config)


def test_every_type_of_peft_is_known():
    assert {*PROMPTS, *FORWARDS} - set(TYPES) <= NEWER_TYPES


def test_offsets_of_an_activated_adapter_are_refused(train, student):
    activated = LoraConfig(**LORA, alora_invocation_tokens=[5, 6])
    with pytest.raises(ValueError, match="the student uses an adapter with alora_invocation_tokens"):
        train(peft_config=activated)
    with pytest.raises(ValueError, match="the student uses an adapter with alora_invocation_tokens"):
        train(model=get_peft_model(student, activated))


def test_trained_tokens_of_a_tied_head_are_refused_before_training(train, tokenizer):
    tied = tiny_llama(tokenizer, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"the output embedding of LlamaForCausalLM is a .*must be a plain"):
        train(model=tied, peft_config=LoraConfig(**LORA, trainable_token_indices=[1, 2]))


def test_trained_tokens_of_an_embedding_alone_are_trained(train):
    trainer = train(peft_config=LoraConfig(**LORA, trainable_token_indices=[1, 2]), learning_rate=1e-2)
    before = trainer.model.get_input_embeddings()(torch.tensor([1, 2, 3])).detach()
    trainer.train()
    after = trainer.model.get_input_embeddings()(torch.tensor([1, 2, 3])).detach()
    assert (before != after).any(-1).tolist() == [True, True, False]


# ---- How LoRA begins ----

NAMED = {  # by this version of PEFT
    name.replace("[number of iters]", "4")
    for literal in get_args(get_type_hints(LoraConfig)["init_lora_weights"])
    for name in get_args(literal)
}
INITS = (True, False, "gaussian", "eva", "olora", "pissa", "orthogonal", *{"mica"} & NAMED)
NEWER = {"kasa": "KasaConfig", "velora": "VeloraConfig"}  # than the oldest PEFT that is admitted

VARIANTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
    **{
        name: {f"{name}_config": getattr(peft.tuners.lora.config, of_it)()}
        for name, of_it in NEWER.items()
        if hasattr(peft.tuners.lora.config, of_it)
    },
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "settings",
    [{"init_lora_weights": init} for init in INITS] + list(VARIANTS.values()),
    ids=[*map(str, INITS), *VARIANTS],
)
def test_lora_is_the_same_model_when_it_is_loaded_and_when_it_is_resumed(train, tmp_path, base, settings):
    is_the_same_again(train, tmp_path, base, settings)


def is_the_same_again(train, tmp_path, base, settings) -> None:
    """Saved and loaded with other draws, resumed, and trained further it is the same model."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2}

    def trainer(folder: str):
        return train(
            model=base,
            peft_config=LoraConfig(**LORA, **copy.deepcopy(settings)),
            output_dir=str(tmp_path / folder),
            **saving,
        )

    whole = trainer("whole")
    whole.train()
    want = whole.model.eval()(IDS).logits
    torch.testing.assert_close(reloaded(tmp_path / "whole" / "checkpoint-4"), want)
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    torch.testing.assert_close(resumed.model.eval()(IDS).logits, want)
    again = train(model=str(tmp_path / "whole" / "checkpoint-4"))
    torch.testing.assert_close(again.model.eval()(IDS).logits, want)


UNREPEATED = ["pissa_niter_4", "corda", *{"lora_ga"} & NAMED]


@pytest.mark.parametrize("init", UNREPEATED)
def test_a_start_that_loading_does_not_repeat_is_refused(train, init):
    settings = {"lora_ga_config": peft.LoraGAConfig()} if init == "lora_ga" else {}
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}', which changes the base"):
        train(peft_config=LoraConfig(**LORA, init_lora_weights=init, **settings))


@pytest.mark.parametrize("role", ["model", "teacher_model"])
def test_a_saved_adapter_with_such_a_start_is_refused(train, tmp_path, base, role):
    plain = load_causal_lm(base, {"dtype": "float32"}, distributed=False)
    get_peft_model(plain, LoraConfig(**LORA, init_lora_weights="pissa_niter_4")).save_pretrained(tmp_path / "fast")
    seeds = []
    for seed in (1, 2):  # the reason: PEFT draws again
        torch.manual_seed(seed)
        seeds.append(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "fast", dtype=torch.float32)(IDS).logits)
    assert not torch.allclose(*seeds, atol=1e-3)
    with pytest.raises(ValueError, match="init_lora_weights='pissa_niter_4'"):
        train(**{role: str(tmp_path / "fast")}, train_dataset=messages_dataset(2))


def test_every_start_of_peft_is_known():
    assert NAMED and {*INITS, *UNREPEATED, "loftq"} >= NAMED


# ---- LoftQ, which PEFT computes on a GPU, here on the CPU in its place ----


def loftq(iterations: int) -> dict:
    return {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_iter=iterations)}


@pytest.fixture
def loftq_on_cpu(monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    for kind in (torch.Tensor, bnb.nn.Params4bit):

        def to(self, *args, _own=kind.to, **kwargs):
            return _own(self, *("cpu" if arg == "cuda" else arg for arg in args), **replaced(kwargs))

        monkeypatch.setattr(kind, "to", to)
    monkeypatch.setattr("amid_trl.models.pairs.has_device_of_loftq", lambda: True)


def replaced(kwargs: dict) -> dict:
    return {name: "cpu" if name == "device" and value == "cuda" else value for name, value in kwargs.items()}


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_the_same_model_again(train, tmp_path, base, loftq_on_cpu, iterations):
    is_the_same_again(train, tmp_path, base, loftq(iterations))


def test_loftq_is_repeated_in_the_dtype_in_which_it_began(train, tmp_path, base, loftq_on_cpu):
    settings = {"model_init_kwargs": {"dtype": "bfloat16"}, "learning_rate": 1e-2}
    config = LoraConfig(**LORA, **loftq(3))
    trainer = train(model=base, peft_config=config, **settings)
    assert config.loftq_config == {"loftq_bits": 4, "loftq_iter": 3}
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    adapted = trainer.model.eval()
    torch.testing.assert_close(reloaded(tmp_path / "adapter"), adapted.float()(IDS).logits)
    other = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    assert not torch.allclose(other(IDS).logits, adapted(IDS).logits, atol=0.1)  # the reason
    merged = merged_model(str(tmp_path / "adapter"), tiny_tokenizer()).model
    torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="LoftQ has its device")
@pytest.mark.parametrize("role", ["model", "teacher_model"])
def test_loftq_is_refused_by_name_where_there_is_no_gpu(train, tmp_path, base, role):
    config = LoraConfig(**LORA, **loftq(1))
    with pytest.raises(
        ValueError, match="the student uses an adapter with init_lora_weights='loftq', which PEFT comp"
    ):
        train(model=base, peft_config=config)
    config.base_model_name_or_path = base
    config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="init_lora_weights='loftq', which PEFT computes on a GPU"):
        train(**{role: str(tmp_path / "adapter")})
