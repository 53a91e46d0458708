"""`amid-trl serve-teacher` answers the states of the teacher in memory, says who it is, and refuses too much."""

import json
import socket
import threading
import time

import pytest
import torch
import urllib3
from accelerate import Accelerator
from families import family_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save
from states_server import hosting
from tiny import save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from amid_trl.data.batches import PromptTokens, completion_batch
from amid_trl.maths.linear import States
from amid_trl.models.own_logits import check_own_logits
from amid_trl.teacher.connection import Connection
from amid_trl.teacher.exchange import AboutTeacher, Question, Vocabulary, longest_question, question_bytes
from amid_trl.teacher.head_files import kept_head
from amid_trl.teacher.hosted import Hosting, identity, load_hosted, passes
from amid_trl.teacher.in_memory import ModelTeacher
from amid_trl.teacher.remote import RemoteTeacher


HTTP = urllib3.PoolManager(retries=False)
LENGTHS = [(5, 3), (1, 9), (7, 1), (2, 2), (4, 0), (5, 3)]


def batch_of(lengths=LENGTHS, seed: int = 0, least: int = 3):
    """Rows of so many tokens of prompt and completion; in the one without a completion nothing is trained."""
    draw = torch.Generator().manual_seed(seed)
    rows = [[torch.randint(least, 360, (n,), generator=draw) for n in both] for both in lengths]
    prompts, completions = zip(*rows, strict=True)
    return completion_batch([*map(PromptTokens, prompts)], completions, 0)


def connected(server, **connection) -> RemoteTeacher:
    connection = Connection(server.url, **{"patience": 5.0, "backoff": 0.001, **connection})
    return RemoteTeacher(connection, server.about, kept_head(server.about, connection))


def in_memory(model, batch) -> States:
    return ModelTeacher(model, Accelerator(cpu=True))(batch)


def assert_same(mine: States, want: States, **tolerance) -> None:
    assert mine.hidden.dtype == want.hidden.dtype and mine.hidden.shape == want.hidden.shape
    torch.testing.assert_close(mine.hidden, want.hidden, **tolerance)
    assert torch.equal(mine.head.weight, want.head.weight) and mine.head.finish == want.head.finish
    assert (mine.head.bias is None) == (want.head.bias is None)
    if mine.head.bias is not None:
        assert torch.equal(mine.head.bias, want.head.bias)


# ---- Its answers ----


@pytest.mark.parametrize("pass_tokens", [1, 24, 8192])
def test_states_are_those_of_the_teacher_in_memory(tokenizer, pass_tokens):
    model, batch = tiny_llama(tokenizer, seed=3), batch_of()
    with hosting(model, tokenizer, pass_tokens=pass_tokens) as server:
        mine = connected(server)(batch)
    assert mine.hidden.shape == (18, 32)
    assert_same(mine, in_memory(model, batch), rtol=1e-6, atol=1e-6)
    own = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    torch.testing.assert_close(mine.head(mine.hidden), own[batch["labels"][:, 1:] != -100], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_sent_as_it_is(tokenizer, dtype):
    model, batch = tiny_llama(tokenizer, seed=3).to(dtype), batch_of()
    with hosting(model, tokenizer) as server:
        mine = connected(server)(batch)
    assert server.about.dtype == str(dtype).removeprefix("torch.")
    want = in_memory(model, batch)
    assert_same(mine, want, rtol=2**-6, atol=2**-6 * want.hidden.abs().max().item())  # rows stand beside others


@pytest.mark.parametrize("family", ["bert", "cohere", "falcon_h1", "gemma2", "granite", "llama4_text", "roberta"])
def test_every_kind_of_head_and_of_backbone_is_served(tokenizer, family):
    """A bias and a layer before the head, scales by three names, a softcap, positions found by the padding."""
    model, batch = family_model(family, tokenizer, seed=1), batch_of()
    with hosting(model, tokenizer) as server:
        mine = connected(server)(batch)
    assert_same(mine, in_memory(model, batch), rtol=1e-5, atol=1e-5)
    finish = {"gemma2": (1.0, 30.0), "cohere": (0.0625, None)}.get(family)
    assert finish is None or mine.head.finish == finish


def test_a_teacher_without_trained_tokens_answers_nothing(tokenizer):
    with hosting(tiny_llama(tokenizer), tokenizer) as server:
        asked = len(server.questions)
        answer = connected(server)(batch_of([(4, 0), (2, 0)]))
    assert answer.hidden.shape == (0, 32) and "/amid-trl/states" not in server.questions[asked:]


def test_rows_run_together_by_length_within_the_bound():
    assert list(passes([5, 1, 9, 2, 9], 10)) == [[1, 3], [0], [2], [4]]
    assert list(passes([5, 1, 9, 2, 9], 18)) == [[1, 3, 0], [2, 4]]
    assert list(passes([5, 5], 1)) == [[0], [1]]


# ---- Who it is ----


def test_it_says_who_it_is(tokenizer):
    model = tiny_llama(tokenizer, seed=3, vocab_size=368, max_position_embeddings=64)
    with hosting(model, tokenizer, max_rows=7, max_tokens=70, max_body_bytes=700) as server:
        said = json.loads(HTTP.request("GET", f"{server.url}/amid-trl/teacher").data)
        vocabulary = Vocabulary(**json.loads(HTTP.request("GET", f"{server.url}/amid-trl/vocabulary").data))
    assert AboutTeacher(**said) == server.about
    assert (said["name"], said["vocabulary"], said["dim"], said["positions"]) == ("tiny", 368, 32, 64)
    assert (said["max_rows"], said["max_tokens"], said["max_body_bytes"], said["protocol"]) == (7, 70, 700, 1)
    assert vocabulary.get_vocab() == tokenizer.get_vocab()
    assert vocabulary.get_added_vocab() == tokenizer.get_added_vocab()


def test_every_answer_has_its_identity(tokenizer):
    with hosting(tiny_llama(tokenizer), key="k") as server:
        for path in ("/amid-trl/teacher", "/amid-trl/vocabulary", "/nowhere", "/v1/models"):
            for headers in ({}, {"Authorization": "Bearer k"}):
                answer = HTTP.request("GET", server.url + path, headers=headers)
                assert answer.headers["Amid-Trl-Identity"] == server.about.identity
                assert answer.headers["Amid-Trl-Protocol"] == "1"


def test_the_identity_is_that_of_weights_and_configuration(tokenizer, tmp_path):
    model = tiny_llama(tokenizer, seed=3)
    places = [str(save_tiny(tmp_path / name, model, tokenizer)) for name in ("here", "there")]
    assert len({load_hosted(Hosting(place)).identity for place in places}) == 1, "not of the folder"
    first = identity(model)
    assert identity(tiny_llama(tokenizer, seed=3)) == first
    others = {identity(tiny_llama(tokenizer, seed=4)), identity(tiny_llama(tokenizer, seed=3, rms_norm_eps=1e-3))}
    others |= {identity(tiny_llama(tokenizer, seed=3, rope_theta=500.0)), identity(model.bfloat16())}
    changed = tiny_llama(tokenizer, seed=3)
    changed.model.layers[1].mlp.down_proj.weight.data[5, 7] += 1e-7
    others |= {identity(changed)}
    adapted = get_peft_model(tiny_llama(tokenizer, seed=3), LoraConfig(target_modules="all-linear"))
    others |= {identity(adapted)}
    adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight.data[0, 0] = 1e-7
    others |= {identity(adapted)}
    assert len(others | {first}) == 8


def test_weights_on_disk_are_read_for_the_identity(tokenizer, tmp_path):
    place = str(save_tiny(tmp_path / "model", tiny_llama(tokenizer, seed=3), tokenizer))
    parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    places = {**{f"model.{part}": "cpu" for part in parts}, "lm_head": "cpu"}
    whole, split = (
        AutoModelForCausalLM.from_pretrained(place, device_map=each, offload_folder=str(tmp_path / "disk"))
        for each in (places, {**places, "model.layers.0": "disk"})
    )
    assert split.model.layers[0].mlp.up_proj.weight.is_meta
    assert identity(split) == identity(whole)
    with torch.no_grad():
        batch = batch_of()
        with hosting(split, tokenizer) as server:
            assert_same(connected(server)(batch), in_memory(whole, batch), rtol=1e-6, atol=1e-6)


# ---- Loading ----


def test_an_adapter_is_put_on_the_model(tokenizer, tmp_path):
    base = tiny_llama(tokenizer, seed=3)
    place = str(save_tiny(tmp_path / "base", base, tokenizer))
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    batch = batch_of()
    want = in_memory(adapted, batch)
    for hosting_ in (Hosting(place, adapter=str(tmp_path / "adapter")), Hosting(str(tmp_path / "adapter"))):
        if hosting_.adapter is None:  # the adapter names its base
            config = tmp_path / "adapter" / "adapter_config.json"
            config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": place}))
        with hosting(load_hosted(hosting_)) as server:
            assert_same(connected(server)(batch), want, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="is an adapter already"):
        load_hosted(Hosting(str(tmp_path / "adapter"), adapter=str(tmp_path / "adapter")))


def test_a_quantised_teacher_is_that_of_a_run(tokenizer, tmp_path, train):
    pytest.importorskip("bitsandbytes")
    model = tiny_llama(tokenizer, seed=2, hidden_size=64, intermediate_size=128)
    place = str(save_tiny(tmp_path / "model", model, tokenizer))
    trainer = train(teacher_model=place, teacher_load_in_4bit=True)
    loaded, batch = load_hosted(Hosting(place, dtype="float32", bits=4)), batch_of()
    with hosting(loaded) as server:
        mine = connected(server)(batch)
    want = trainer.teacher(batch)
    assert (mine.hidden - in_memory(model, batch).hidden).abs().max() > 0.1, "it is quantised"
    assert_same(mine, want, rtol=1e-6, atol=1e-6)
    assert load_hosted(Hosting(place, dtype="float32", bits=4)).identity == loaded.identity


def test_a_multimodal_checkpoint_is_its_language_model(tokenizer, tmp_path):
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    text = Gemma3TextConfig(vocab_size=384, hidden_size=32, num_key_value_heads=1, head_dim=16, **sizes)
    vision = SiglipVisionConfig(hidden_size=16, image_size=28, patch_size=14, **sizes)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    whole = Gemma3ForConditionalGeneration(config).eval()
    place = save_tiny(tmp_path / "whole", whole, tokenizer)
    ids = torch.tensor([[5, 9, 300, 7]])
    labels = torch.tensor([[-100, 9, 300, 7]])
    with hosting(load_hosted(Hosting(str(place)))) as server:
        mine = connected(server)({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    want = whole(input_ids=ids).logits[0, :-1]
    torch.testing.assert_close(mine.head(mine.hidden), want, rtol=1e-5, atol=1e-5)


def test_a_model_that_the_loss_cannot_read_is_refused(tokenizer, tmp_path):
    place = save_tiny(tmp_path / "model", family_model("prophetnet", tokenizer), tokenizer)
    with pytest.raises(ValueError, match="the teacher, a ProphetNet"):
        load_hosted(Hosting(str(place)))
    check_own_logits(tiny_gpt2(tokenizer), "teacher")  # or this would test nothing


# ---- What it refuses ----


def question(rows=((5, 9, 3),)) -> Question:
    ids = [torch.tensor(row) for row in rows]
    return Question.of(ids, [torch.ones(len(row), dtype=torch.bool) for row in ids])


def post(server, body: bytes, **headers: str):
    answer = HTTP.request("POST", f"{server.url}/amid-trl/states", body=body, headers=headers)
    return answer.status, answer.data.decode(errors="replace")


BAD = {
    "no safetensors": (lambda: b"nothing of the kind", 400, "no safetensors file"),
    "another tensor": (lambda: save({"ids": torch.zeros(2)}), 400, "a question has ids, ends, asked; got ids"),
    "another dtype": (lambda: question()._replace(ids=torch.zeros(3)).pack(), 400, "int32, int64 and bool"),
    "no rows": (lambda: question()._replace(ends=torch.zeros(0, dtype=torch.long)).pack(), 400, "every row of"),
    "an empty row": (lambda: question()._replace(ends=torch.tensor([0, 3])).pack(), 400, "every row of a question"),
    "ends before": (lambda: question()._replace(ends=torch.tensor([2])).pack(), 400, r"got (3, 3, 2)"),
    "a negative id": (lambda: question([[5, -1]]).pack(), 400, "token ids are from 0 to 359; got -1 to 5"),
    "an unknown id": (lambda: question([[5, 360]]).pack(), 400, "token ids are from 0 to 359; got 5 to 360"),
    "too long": (lambda: question([[5] * 33]).pack(), 400, "rows of at most 32 tokens; got 33"),
    "too many rows": (lambda: question([[5]] * 4).pack(), 413, "at most 3 rows (--max-rows); got 4"),
    "too many tokens": (lambda: question([[5] * 30] * 2).pack(), 413, "at most 50 tokens (--max-tokens); got 60"),
    "too large": (lambda: b"0" * 2001, 413, "at most 2000 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_question_or_too_much_is_refused_in_words(tokenizer, name):
    body, status, words = BAD[name]
    bounds = {"max_rows": 3, "max_tokens": 50, "max_body_bytes": 2000}
    with hosting(tiny_llama(tokenizer, max_position_embeddings=32), tokenizer, **bounds) as server:
        answered = post(server, body())
        assert answered[0] == status and words in answered[1]
        assert post(server, question().pack())[0] == 200, "it goes on"


def test_without_the_key_nothing_is_answered(tokenizer):
    with hosting(tiny_llama(tokenizer), tokenizer, key="the key") as server:
        body = question().pack()
        for headers in ({}, {"Authorization": "the key"}, {"Authorization": "Bearer the ke"}):
            assert post(server, body, **headers) == (401, "the key is missing, or another one")
            for path in ("teacher", "vocabulary", f"head/{server.about.head}", "nowhere"):
                answer = HTTP.request("GET", f"{server.url}/amid-trl/{path}", headers=headers)
                assert answer.status == 401 and b"tiny" not in answer.data
        assert post(server, body, Authorization="Bearer the key")[0] == 200


def test_what_fails_in_the_model_is_said(tokenizer, caplog):
    with hosting(tiny_llama(tokenizer), tokenizer) as server:
        real, fails = server.teacher._base.model.forward, [RuntimeError("a kernel"), torch.OutOfMemoryError("full")]

        def forward(*args, **kwargs):
            if fails:
                raise fails.pop(0)
            return real(*args, **kwargs)

        server.teacher._base.model.forward = forward
        assert post(server, question().pack()) == (500, "RuntimeError: a kernel")
        assert post(server, question().pack()) == (507, "lower --pass-tokens of serve-teacher: full")
        status, _ = post(server, question().pack())
    assert status == 200 and "A question about 3 tokens has failed" in caplog.text


def test_questions_are_answered_in_turn_and_not_for_who_has_gone(tokenizer):
    running, together, computed = [], [], []
    with hosting(tiny_llama(tokenizer), tokenizer) as server:
        real = server.teacher._base.model.forward

        def forward(*args, input_ids, **kwargs):
            running.append(1)
            together.append(len(running))
            computed.append(input_ids.shape[1])
            time.sleep(0.3)
            running.pop()
            return real(*args, input_ids=input_ids, **kwargs)

        server.teacher._base.model.forward = forward
        bodies = [question([[5] * n]).pack() for n in (2, 3)]
        threads = [threading.Thread(target=post, args=(server, body)) for body in bodies]
        threads[0].start()
        time.sleep(0.1)
        gone = socket.create_connection(("127.0.0.1", server.port))
        body = question([[5] * 9]).pack()
        gone.sendall(b"POST /amid-trl/states HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        time.sleep(0.05)
        gone.close()
        threads[1].start()
        assert HTTP.request("GET", f"{server.url}/amid-trl/teacher").status == 200
        assert computed == [2], "it hears while it computes"
        for thread in threads:
            thread.join()
    assert set(together) == {1} and computed == [2, 3]


def test_a_question_and_its_answer_are_small(tokenizer):
    rows = question([[5] * 100] * 7)
    assert len(rows.pack()) == question_bytes(700, 7) < 700 * 5 + 7 * 8 + 300
    with hosting(tiny_llama(tokenizer).bfloat16(), tokenizer) as server:
        answer = HTTP.request("POST", f"{server.url}/amid-trl/states", body=rows.pack())
    assert load(answer.data)["hidden"].shape == (700, 32)
    assert len(answer.data) < 700 * 32 * 2 + 100


@pytest.mark.parametrize("lengths", [(1,), (2,), (9,), (10,), (19,), (99, 1), (1000,), (3,) * 12, (12345,)])
def test_how_long_a_question_is_is_known_beforehand(lengths):
    size = len(question([[5] * length for length in lengths]).pack())
    assert question_bytes(sum(lengths), len(lengths)) == size
    if len(lengths) == 1:
        assert longest_question(10**9, size) == lengths[0] > longest_question(10**9, size - 1)
        assert longest_question(1, size) == 1


def test_tokenizers_are_not_needed(tmp_path):
    model = tiny_llama(tiny_tokenizer(), seed=3)
    model.save_pretrained(tmp_path / "model")
    loaded = load_hosted(Hosting(str(tmp_path / "model")))
    batch = batch_of()
    with hosting(loaded) as server:
        assert server.about.tokenizer is None
        assert HTTP.request("GET", f"{server.url}/amid-trl/vocabulary").status == 404
        assert_same(connected(server)(batch), in_memory(model, batch), rtol=1e-6, atol=1e-6)
