import copy
from pathlib import Path

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    GPTNeoXConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
)

from amid_trl.models.layers import parse_layers
from amid_trl.models.pruning import drop_layers


LAYERS = 6
DROPPED = (1, 3, 4)
PROMPT = torch.tensor([[5, 17, 29, 8, 40], [11, 3, 52, 33, 7]])


def from_config(config) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.mul_(8)  # away from 0.02, so that every layer changes the output visibly
    return model.eval()


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WITHOUT_GROUPS = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}

FAMILIES = {
    "llama": lambda: tiny_llama(tiny_tokenizer(), num_hidden_layers=LAYERS),
    "llama_tied": lambda: tiny_llama(tiny_tokenizer(), num_hidden_layers=LAYERS, tie_word_embeddings=True),
    "gpt2": lambda: tiny_gpt2(tiny_tokenizer(), n_layer=LAYERS),
    "qwen2": lambda: from_config(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=3)),
    "gemma2": lambda: from_config(Gemma2Config(**SIZES, head_dim=8, sliding_window=3)),
    "opt": lambda: from_config(OPTConfig(**WITHOUT_GROUPS, ffn_dim=48, word_embed_proj_dim=32)),
    "gpt_neox": lambda: from_config(GPTNeoXConfig(**WITHOUT_GROUPS)),
    "mixtral": lambda: from_config(MixtralConfig(**SIZES, num_local_experts=LAYERS)),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return FAMILIES[request.param]()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def test_dropping_identities_changes_nothing(model):
    for layer in DROPPED:
        for parameter in decoder_layers(model)[layer].parameters():
            parameter.data.zero_()  # the block adds 0 to its residual stream
    torch.testing.assert_close(logits(drop_layers(model, DROPPED)), logits(model), atol=0, rtol=0)


def test_the_student_is_the_teacher_with_the_layers_skipped(model):
    student = drop_layers(model, DROPPED)
    full = logits(model)
    for layer in DROPPED:
        decoder_layers(model)[layer].register_forward_hook(lambda module, args, output: args[0])
    torch.testing.assert_close(logits(student), logits(model), atol=0, rtol=0)
    assert (logits(student) - full).abs().max() > 1e-3


def test_generation_with_and_without_cache_agree(model):
    student = drop_layers(model, DROPPED)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = student.generate(PROMPT, use_cache=True, **settings)
    assert torch.equal(cached, student.generate(PROMPT, use_cache=False, **settings))


def test_the_student_survives_saving(model, tmp_path: Path):
    student = drop_layers(model, DROPPED)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == LAYERS - len(DROPPED)
    torch.testing.assert_close(logits(loaded), logits(student), atol=0, rtol=0)


def test_the_teacher_is_left_alone(model):
    config, weights, names = model.config.to_dict(), copy.deepcopy(model.state_dict()), list(model.state_dict())
    student = drop_layers(model, DROPPED)
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in student.parameters()}
    for parameter in student.parameters():
        parameter.data.fill_(1.0)
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == names
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_tied_embeddings_stay_tied():
    student = drop_layers(FAMILIES["llama_tied"](), DROPPED)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_lists_with_one_entry_per_layer_lose_the_same_entries():
    teacher = FAMILIES["qwen2"]()
    assert teacher.config.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 3
    student = drop_layers(teacher, (0, 1, 5))
    assert student.config.layer_types == ["full_attention"] + ["sliding_attention"] * 2


def test_end_of_text_tokens_are_not_a_list_of_layers():
    teacher = tiny_llama(tiny_tokenizer(), num_hidden_layers=3, eos_token_id=[2, 0, 1])
    assert drop_layers(teacher, [0]).config.eos_token_id == [2, 0, 1]


def test_generation_settings_dtype_and_attention_are_kept():
    teacher = FAMILIES["llama"]().to(torch.bfloat16)
    teacher.config.dtype = torch.float32  # what a configuration file says is not what the weights are
    teacher.set_attn_implementation("eager")
    teacher.generation_config.repetition_penalty = 1.25
    student = drop_layers(teacher, DROPPED)
    assert student.generation_config.to_dict() == teacher.generation_config.to_dict()
    assert student.generation_config is not teacher.generation_config
    assert student.dtype == torch.bfloat16
    assert student.config._attn_implementation == "eager"
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.name_or_path == student.config.name_or_path == ""


def test_a_list_inside_a_layer_is_not_the_list_of_layers():
    teacher = FAMILIES["llama"]()
    teacher.model.layers[0].mlp.experts = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
    assert drop_layers(teacher, DROPPED).config.num_hidden_layers == LAYERS - len(DROPPED)


def test_two_lists_of_that_length_are_an_error_that_names_them():
    teacher = FAMILIES["llama"]()
    teacher.model.towers = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
    with pytest.raises(ValueError, match=r"num_hidden_layers = 6; found model\.layers, model\.towers"):
        drop_layers(teacher, DROPPED)


def test_a_decoder_of_another_length_is_an_error_that_says_what_was_looked_for():
    sizes = {"encoder_layers": 3, "decoder_layers": 2, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    teacher = BartForConditionalGeneration(BartConfig(vocab_size=64, max_position_embeddings=16, **sizes, **heads))
    teacher.model.decoder.layers.append(nn.Identity())
    teacher.model.decoder.layers.append(nn.Identity())
    with pytest.raises(
        ValueError, match=r"BartDecoder\) for one nn\.ModuleList of length num_hidden_layers = \d; found"
    ):
        drop_layers(teacher, [0])


def test_layers_that_depend_on_their_position_are_an_error_that_names_the_parameters():
    sizes = SIZES | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    teacher = from_config(Qwen2MoeConfig(**sizes, decoder_sparse_step=2))  # every second layer has experts
    with pytest.raises(ValueError, match=r"without \[1\] .* depend on their position: model\.layers\.1\.mlp"):
        drop_layers(teacher, [1])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([6], r"drop_layers\(LlamaForCausalLM\): the layers are 0 to 5; got \[6\]"),
        ([-1, 2, 9], r"the layers are 0 to 5; got \[-1, 9\]"),
        (range(6), "all 6 layers would be dropped"),
    ],
)
def test_impossible_layers_are_errors(layers, message):
    with pytest.raises(ValueError, match=message):
        drop_layers(FAMILIES["llama"](), layers)


def test_only_a_plain_transformers_model_is_taken():
    with pytest.raises(ValueError, match=r"transformers model without adapters; got Linear"):
        drop_layers(nn.Linear(2, 2), [0])  # type: ignore[arg-type]  # the wrong type is the test


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("16-21,25", (16, 17, 18, 19, 20, 21, 25)),
        ("3", (3,)),
        (" 5 , 1 - 2 ", (1, 2, 5)),
        ("4-4,2,2", (2, 4)),
    ],
)
def test_layers_are_numbers_and_inclusive_ranges(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "1,,2", "a", "1-", "-3", "1-2-3", "1.5", "²"])
def test_text_that_is_not_a_layer_is_named(text):
    with pytest.raises(ValueError, match="numbers and ranges such as '16-21,25'"):
        parse_layers(text)
    with pytest.raises(ValueError) as error:
        parse_layers(text)
    assert repr(text) in str(error.value)


def test_a_range_that_runs_backwards_is_named():
    with pytest.raises(ValueError, match=r"'9-7' in '1,9-7' does not"):
        parse_layers("1,9-7")
