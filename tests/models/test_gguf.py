"""Models and tokenizers out of GGUF files, which are written here as llama.cpp's converter writes them."""

import json
import re
from pathlib import Path

import gguf
import pytest
import torch
from peft import LoraConfig
from tiny import tiny_llama, tiny_tokenizer
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_trl.evaluation.models import open_models
from amid_trl.models.gguf import pre_tokenizer_name, warn_of_gguf


GGUF = {"gguf_file": "tiny.gguf"}
DROPPED = "which names its pre-tokenizer 'smollm'; transformers drops it and splits text as GPT-2 does"
KEPT = "which keeps no normalizer and of its pre-tokenizer at most a name"


@pytest.fixture
def written(tmp_path):
    """The folder of a tiny Llama as a GGUF file, in whose header a pre-tokenizer is named."""

    def write(pre: str | None = "smollm", folder: Path = tmp_path / "tiny-GGUF") -> str:
        folder.mkdir(parents=True)
        tokenizer = tiny_tokenizer()
        model = tiny_llama(tokenizer, seed=1)
        config, file = model.config, gguf.GGUFWriter(folder / "tiny.gguf", "llama")
        file.add_block_count(config.num_hidden_layers)
        file.add_context_length(config.max_position_embeddings)
        file.add_embedding_length(config.hidden_size)
        file.add_feed_forward_length(config.intermediate_size)
        file.add_head_count(config.num_attention_heads)
        file.add_head_count_kv(config.num_key_value_heads)
        file.add_layer_norm_rms_eps(config.rms_norm_eps)
        file.add_vocab_size(config.vocab_size)
        file.add_tokenizer_model("gpt2")
        if pre is not None:
            file.add_tokenizer_pre(pre)
        spelling = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        tokens = sorted(spelling["vocab"], key=spelling["vocab"].get)
        file.add_token_list(tokens)
        file.add_token_merges([" ".join(pair) for pair in spelling["merges"]])
        file.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
        file.add_eos_token_id(tokenizer.eos_token_id)
        file.add_pad_token_id(tokenizer.pad_token_id)
        file.add_chat_template(tokenizer.chat_template)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        for name, weight in model.state_dict().items():
            file.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", weight.numpy())
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        return str(folder)

    return write


def of_gguf(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "amid_trl.models.gguf"]


@pytest.mark.parametrize("pre", ["smollm", "a.x-4.0", None])
def test_the_name_in_the_file_is_read(written, pre):
    assert pre_tokenizer_name(Path(written(pre), "tiny.gguf")) == pre


def test_a_teacher_out_of_a_gguf_file_teaches_what_it_says(train, tokenizer, written):
    folder = written()
    trainer = train(teacher_model=folder, teacher_model_init_kwargs=GGUF, max_steps=1)
    ids = torch.arange(20, 40)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder, **GGUF)(ids).logits
    torch.testing.assert_close(trainer.teacher_model(ids).logits, expected, rtol=0, atol=0)
    trainer.train()


def test_its_vocabulary_is_compared(train, written, caplog):
    other = tiny_tokenizer(vocab_size=380)
    given = {"model": tiny_llama(other), "processing_class": other, "teacher_model": written()}
    train(**given, teacher_model_init_kwargs=GGUF)
    assert re.search(r"The teacher has another tokenizer \(.*tiny-GGUF\) than the student", caplog.text)
    with pytest.raises(ValueError, match=r"seq_kd=True needs .* the student's tokenizer: .*tiny-GGUF"):
        train(**given, teacher_model_init_kwargs=GGUF, seq_kd=True)


@pytest.mark.parametrize(("pre", "said"), [("smollm", DROPPED), ("qwen2", KEPT), ("gpt-2", KEPT), (None, KEPT)])
def test_a_tokenizer_out_of_a_gguf_file_is_told_once(train, written, caplog, pre, said):
    made = AutoTokenizer.from_pretrained(written(pre), **GGUF)
    train(processing_class=made)
    [line] = of_gguf(caplog)
    assert said in line and "tiny-GGUF is made of tiny.gguf" in line
    assert line.endswith("give the original tokenizer as processing_class.")


def test_an_evaluation_tells_it_too(written, student, caplog):
    open_models(student, None, AutoTokenizer.from_pretrained(written(), **GGUF), "float32", False)
    assert len(of_gguf(caplog)) == 1


def test_a_tokenizer_out_of_the_cache_is_told(monkeypatch, tmp_path, tokenizer, written, caplog):
    repository = tmp_path / "models--someone--tiny-GGUF"
    written("deepseek-llm", repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    tokenizer.name_or_path = "someone/tiny-GGUF"
    warn_of_gguf(tokenizer)
    assert "someone/tiny-GGUF is made of tiny.gguf, which names its pre-tokenizer 'deepseek-llm'" in caplog.text


def test_nothing_is_told_of_a_tokenizer_that_lies_beside_the_file(train, written, tokenizer, caplog):
    folder = written()
    tokenizer.save_pretrained(folder)
    train(processing_class=AutoTokenizer.from_pretrained(folder))
    train(teacher_model=folder, teacher_model_init_kwargs=GGUF)
    assert not of_gguf(caplog)


@pytest.mark.parametrize("splits", [True, False])
def test_a_teachers_file_is_told_where_texts_are_split_otherwise(train, written, tokenizer, caplog, splits):
    if splits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    train(teacher_model=written(), teacher_model_init_kwargs=GGUF)
    assert [DROPPED in line for line in of_gguf(caplog)] == ([] if splits else [True])


@pytest.mark.parametrize("adapter", [None, LoraConfig(target_modules="all-linear")])
@pytest.mark.parametrize("form", ["name", "model"])
def test_a_student_out_of_a_gguf_file_is_refused_by_name(train, written, form, adapter):
    model, settings = written(), {"model_init_kwargs": GGUF}
    if form == "model":
        model, settings = AutoModelForCausalLM.from_pretrained(model, **GGUF), {}
    with pytest.raises(ValueError, match=r"the student is read from a GGUF file.*it can be a teacher"):
        train(model=model, processing_class=None, peft_config=adapter, **settings)
