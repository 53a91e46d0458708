"""A teacher that knows some of its tokens alone: the same model at these."""

import copy

import pytest
import torch
from families import all_families, family_model
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    PreTrainedModel,
)

from amid_trl.models.heads import forward_inputs
from amid_trl.models.pruning import drop_layers, keep_tokens


# Of 360: special ones, a row in the middle, the last ones.
KEPT = [0, 1, 2, *range(7, 200, 3), 350, 359]
# A table that holds prompts too; a size of another name; a row of padding that transformers makes zero at loading.
NEED_OTHER_TABLES = ("cpmant", "marian", "youtu")
# Heads tied and not, with a bias, scaled, capped; a table in every layer, weights behind the states, no attention.
FEW = [
    "bert",
    "cohere",
    "cpmant",
    "gemma2",
    "gemma3n_text",
    "gpt2",
    "gptj",
    "mamba",
    "minicpm3",
    "opt",
    "phi",
    "qwen3_moe",
]


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**forward_inputs(model, ids, torch.ones_like(ids))).logits


@pytest.mark.parametrize(
    "family", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in all_families()]
)
def test_at_the_kept_tokens_the_logits_are_the_teachers(family, tokenizer, tmp_path):
    teacher = family_model(family, tokenizer)
    if family in NEED_OTHER_TABLES:
        with pytest.raises(
            ValueError, match=rf"keep_tokens\({type(teacher).__name__}\): .* its logits at them would be"
        ):
            keep_tokens(teacher, KEPT)
        return
    student = keep_tokens(teacher, KEPT)
    new = torch.randint(len(KEPT), (2, 24), generator=torch.Generator().manual_seed(0))
    expected = logits_of(teacher, torch.tensor(KEPT)[new])[..., KEPT]
    got = logits_of(student, new)
    assert got.shape == (2, 24, len(KEPT))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), new), got)


def test_a_table_of_fewer_tokens_keeps_those_of_them_that_stay(tokenizer):
    """Gemma 3n's tables in its layers know no tokens behind the text's."""
    teacher = family_model("gemma3n_text", tokenizer, vocab_size_per_layer_input=300)
    student = keep_tokens(teacher, KEPT)
    assert student.config.vocab_size_per_layer_input == len(KEPT) - 2
    new = torch.arange(len(KEPT) - 2)[None]  # older versions of transformers read no others
    torch.testing.assert_close(logits_of(student, new), logits_of(teacher, torch.tensor(KEPT)[new])[..., KEPT])


def test_a_multimodal_model_loses_the_rows_of_its_text(tokenizer):
    text = {"vocab_size": 360, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 350, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    teacher = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**text, **heads},
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            image_token_index=359,
        )
    ).eval()
    student = keep_tokens(teacher, KEPT)
    assert student.config.text_config.vocab_size == student.get_input_embeddings().num_embeddings == len(KEPT)
    assert student.config.image_token_id == len(KEPT) - 1
    assert student.config.text_config.eos_token_id == len(KEPT) - 2
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied_and_others_apart(tied):
    teacher = tiny_llama(tiny_tokenizer(), tie_word_embeddings=tied)
    student = keep_tokens(teacher, KEPT)
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied
    assert student.config.tie_word_embeddings == tied
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(student, part)().weight, getattr(teacher, part)().weight[KEPT])
    saved = sum(parameter.numel() for parameter in teacher.parameters()) - student.num_parameters()
    assert saved == (1 if tied else 2) * (360 - len(KEPT)) * 32


def test_a_student_of_few_tokens_leaves_its_teacher_alone():
    teacher = tiny_llama(tiny_tokenizer(), tie_word_embeddings=True).train()
    config, weights = teacher.config.to_dict(), copy.deepcopy(teacher.state_dict())
    generation = teacher.generation_config.to_dict()
    student = keep_tokens(teacher, KEPT)
    for parameter in student.parameters():
        assert parameter.requires_grad
        parameter.data.fill_(1.0)
    assert teacher.training and not student.training
    assert (teacher.config.to_dict(), teacher.generation_config.to_dict()) == (config, generation)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in teacher.state_dict().items())


def test_the_padding_of_a_head_is_left_out():
    teacher = tiny_llama(tiny_tokenizer(), vocab_size=384)
    student = keep_tokens(teacher, range(360))
    assert student.config.vocab_size == student.get_output_embeddings().out_features == 360
    assert student.get_input_embeddings().num_embeddings == 360


def test_ids_in_configurations_follow_and_what_is_gone_is_said(caplog):
    teacher = tiny_llama(tiny_tokenizer(), eos_token_id=[2, 350, 3], pad_token_id=359, bos_token_id=4, sep_token_id=-1)
    teacher.generation_config.eos_token_id = [2, 350]
    teacher.generation_config.suppress_tokens = [3, 359]
    student = keep_tokens(teacher, KEPT)
    last = len(KEPT) - 1
    assert (student.config.eos_token_id, student.config.pad_token_id) == ([2, last - 1], last)
    assert (student.config.bos_token_id, student.config.sep_token_id) == (None, -1)
    assert student.get_input_embeddings().padding_idx == last
    assert student.generation_config.eos_token_id == [2, last - 1]
    assert student.generation_config.suppress_tokens == [last]
    assert "LlamaConfig names tokens in eos_token_id that are left out: [3]" in caplog.text
    assert "LlamaConfig names tokens in bos_token_id that are left out: [4]" in caplog.text
    assert "GenerationConfig names tokens in suppress_tokens that are left out: [3]" in caplog.text
    assert student.name_or_path == student.config.name_or_path == ""


def test_layers_and_tokens_are_dropped_together():
    teacher = tiny_llama(tiny_tokenizer(), num_hidden_layers=4, tie_word_embeddings=True)
    one = keep_tokens(drop_layers(teacher, [1, 2]), KEPT).state_dict()
    other = drop_layers(keep_tokens(teacher, KEPT), [1, 2]).state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_dtype_is_kept():
    student = keep_tokens(tiny_llama(tiny_tokenizer()).to(torch.bfloat16), KEPT)
    assert student.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("ids", "given"),
    [
        ([], "none"),
        ([-1, 2], "2 from -1 to 2"),
        ([0, 360], "2 from 0 to 360"),
        ([3, 2], "2 from 2 to 3"),
        ([1, 1], "2 f"),
    ],
)
def test_ids_that_are_no_tokens_are_errors(ids, given):
    with pytest.raises(ValueError, match=rf"Llama.*\): the ids of tokens ascend and are 0 to 359; got {given}"):
        keep_tokens(tiny_llama(tiny_tokenizer()), ids)


class Hashed(LlamaForCausalLM):
    """Adds a second embedding, by the last digit of an id, of which no configuration tells."""

    def __init__(self, config):
        super().__init__(config)
        self.digits = nn.Embedding(10, config.hidden_size)
        self.post_init()

    def forward(self, input_ids, **inputs):
        embedded = self.get_input_embeddings()(input_ids) + self.digits(input_ids % 10)
        return super().forward(inputs_embeds=embedded, **inputs)


def test_a_model_that_reads_ids_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"keep_tokens\(Hashed\): .* would be others, as of a model that reads ids"):
        keep_tokens(Hashed(tiny_llama(tiny_tokenizer()).config), KEPT)
    keep_tokens(Hashed(tiny_llama(tiny_tokenizer()).config), range(300))  # whose ids stay


@pytest.mark.parametrize("family", ["phi", "gptj"])
def test_the_bias_of_a_head_loses_the_same_rows(family, tokenizer):
    """Where it is no zero, as it is when a model is made."""
    teacher = family_model(family, tokenizer)
    bias = teacher.get_output_embeddings().bias
    bias.data.normal_(generator=torch.Generator().manual_seed(0))
    student = keep_tokens(teacher, KEPT)
    assert torch.equal(student.get_output_embeddings().bias, bias[KEPT])
    new = torch.arange(24)[None]
    torch.testing.assert_close(logits_of(student, new), logits_of(teacher, torch.tensor(KEPT)[new])[..., KEPT])
