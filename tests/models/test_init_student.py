"""`amid-trl init-student`: a smaller model and its tokenizer side by side. Layers alone: tests/launch/test_cli.py."""

import pytest
import torch
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
)

from amid_trl import cli
from amid_trl.models.generation import generate_greedy
from amid_trl.models.spelling import token_bytes


def init_student(*arguments) -> int:
    return cli.main(["init-student", *map(str, arguments)])


@pytest.fixture
def teacher_dir(tmp_path):
    """Its head is padded to 384 rows, its special tokens come first, and it ends texts with <|im_end|>."""
    tokenizer = tiny_tokenizer()
    return save_tiny(tmp_path / "teacher", tiny_llama(tokenizer, vocab_size=384, num_hidden_layers=3), tokenizer)


def test_tokens_are_left_out_of_model_and_tokenizer(teacher_dir, tmp_path, capsys):
    assert init_student(teacher_dir, tmp_path / "student", "--vocabulary", 300) == 0
    teacher, student = (AutoModelForCausalLM.from_pretrained(path) for path in (teacher_dir, tmp_path / "student"))
    old, new = (AutoTokenizer.from_pretrained(path) for path in (teacher_dir, tmp_path / "student"))
    before, after = teacher.num_parameters(), student.num_parameters()
    assert f"student: 3 of 3 layers, 300 of 384 tokens, {after:,} of {before:,} parameters" in capsys.readouterr().out
    assert before - after == 2 * 84 * 32
    assert student.config.vocab_size == len(new) == 300
    chat = [{"role": "user", "content": "Is water wet?"}]
    row = torch.tensor([new.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]])
    assert new.decode(row[0]) == old.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = old.convert_tokens_to_ids(new.convert_ids_to_tokens(range(300)))
    with torch.no_grad():
        expected = teacher(torch.tensor(ids)[row]).logits[..., ids]
        torch.testing.assert_close(student(row).logits, expected, rtol=1e-5, atol=1e-5)
    assert [token_bytes(old)[i] for i in ids] == token_bytes(new)


def test_special_tokens_that_move_are_found_again_by_generation(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    end = tokenizer.convert_tokens_to_ids("<|eot|>")
    model = tiny_llama(tokenizer, eos_token_id=end, pad_token_id=end)
    model.generation_config = GenerationConfig(eos_token_id=[2, end], pad_token_id=end)
    save_tiny(tmp_path / "teacher", model, tokenizer)
    assert init_student(tmp_path / "teacher", tmp_path / "student", "--vocabulary", 320) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    new = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert new.convert_tokens_to_ids("<|eot|>") == 319
    assert (student.config.eos_token_id, student.generation_config.eos_token_id) == (319, [2, 319])
    assert student.config.pad_token_id == student.generation_config.pad_token_id == 319
    assert len(generate_greedy(student, new, [[{"role": "user", "content": "Is fire cold?"}]], 8)) == 1


def test_layers_and_tokens_are_left_out_together(teacher_dir, tmp_path, capsys):
    assert init_student(teacher_dir, tmp_path / "student", "--vocabulary", 300, "--drop-layers", "1") == 0
    assert "2 of 3 layers, 300 of 384 tokens" in capsys.readouterr().out
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert (student.config.num_hidden_layers, student.config.vocab_size) == (2, 300)


def test_the_language_model_of_a_multimodal_checkpoint_is_cut(tmp_path):
    text = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, **heads},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    save_tiny(tmp_path / "teacher", Gemma3ForConditionalGeneration(config), tiny_tokenizer())
    assert init_student(tmp_path / "teacher", tmp_path / "student", "--vocabulary", 300) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert type(student).__name__ == "Gemma3ForCausalLM" and student.config.vocab_size == 300
    assert student.get_input_embeddings().num_embeddings == 300


@pytest.mark.parametrize("count", [100, 1000, -5])
def test_a_count_that_cannot_be_is_told_what_is_allowed(teacher_dir, tmp_path, capsys, count):
    assert init_student(teacher_dir, tmp_path / "student", "--vocabulary", count) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "can be cut to 259 tokens (" in said and f"up to its 360; got {count}" in said
    assert not (tmp_path / "student").exists()


@pytest.mark.slow
def test_a_real_model_loses_a_seventh_of_its_weights_with_two_thirds_of_its_tokens(request, tmp_path, capsys):
    """SmolLM2-135M, and the questions and answers of the demo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(request.config.rootpath / "examples")
        import embedded

        teacher, old = embedded.load_teacher(tmp_path)
        data = embedded.questions()
    source, output = tmp_path / "SmolLM2-135M-Instruct", tmp_path / "student"
    assert init_student(source, output, "--vocabulary", 16384) == 0
    assert "30 of 30 layers, 16,384 of 49,152 tokens, 115,640,640 of 134,515,008" in capsys.readouterr().out
    student, new = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    texts = [old.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in data.train]
    rows = [(old(text)["input_ids"], new(text)["input_ids"]) for text in texts]
    size = sum(len(text.encode()) for text in texts)
    per_byte = [sum(map(len, side)) / size for side in zip(*rows, strict=True)]
    assert per_byte == pytest.approx([0.2242, 0.2410], abs=1e-4)
    table = token_bytes(old)
    assert token_bytes(new) == table[:16384]  # the special tokens come first, the others as they are made
    for text, (_, ids) in zip(texts, rows, strict=True):
        assert new.decode(ids) == text
    with torch.no_grad():
        row = torch.tensor([rows[0][1]])
        torch.testing.assert_close(student(row).logits, teacher(row).logits[..., :16384], rtol=1e-4, atol=1e-4)


def test_an_added_token_that_the_model_has_no_row_for_is_left_out(tmp_path):
    """As of Gemma 3's text models, whose tokenizer has one for images."""
    model, tokenizer = tiny_llama(tiny_tokenizer()), tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    save_tiny(tmp_path / "teacher", model, tokenizer)
    assert init_student(tmp_path / "teacher", tmp_path / "student", "--vocabulary", 300) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    new = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert student.config.vocab_size == len(new) == max(new.get_vocab().values()) + 1 == 300
    assert "<image>" not in new.get_vocab()
