"""A teacher with a prompt of its own: what is trained is its distribution after that prompt, on every kind of text."""

import pytest
import torch
from datasets import Dataset
from observe import Windows, logged, weights
from peft import LoraConfig
from tiny import QUESTIONS, tiny_llama

from amid_trl import AMiDConfig, AMiDTrainer


CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "objective": "kd",
    "max_new_tokens": 6,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}
HINT = "It is short. "


def rows(count=8, hint=HINT, **more):
    users = [question for question, *_ in QUESTIONS[:count]]
    chats = [[{"role": "user", "content": text}] for text in users]
    hinted = [[{"role": "user", "content": hint + text}] for text in users]
    answers = [[{"role": "assistant", "content": answer}] for _, answer, *_ in QUESTIONS[:count]]
    return Dataset.from_dict({"prompt": chats, "completion": answers, "teacher_prompt": hinted, **more})


@pytest.fixture
def build(tmp_path, tokenizer):
    def new(teacher=None, dataset=None, folder="run", **settings):
        lora = settings.pop("lora", None)
        return AMiDTrainer(
            tiny_llama(tokenizer, seed=0),
            teacher,
            AMiDConfig(str(tmp_path / folder), **{**CONFIG, **settings}),
            train_dataset=rows() if dataset is None else dataset,
            eval_dataset=rows(3),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False) if lora else None,
        )

    return new


@pytest.fixture
def run(build):
    def train(*args, **settings):
        trainer = build(*args, **settings)
        trainer.train()
        return trainer

    return train


def log_probs(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def kl_by_hand(trainer, teacher, tokenizer):
    """KL(p || q) of the last window that was written, one row at a time: p behind the hint, q behind the question."""
    total = tokens = 0.0
    for batch in trainer._parts.window.batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            ids, labels = ids[mask.bool()].tolist(), labels[mask.bool()].tolist()
            start = next(i for i, label in enumerate(labels) if label != -100)
            text = tokenizer.decode(ids[:start])
            [question] = [q for q, *_ in QUESTIONS if q in text]
            message = [{"role": "user", "content": HINT + question}]
            hinted = tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
            p = log_probs(teacher, hinted + ids[start:])[len(hinted) - 1 : -1]
            q = log_probs(trainer.model, ids)[start - 1 : -1]
            trained = torch.tensor(labels[start:]) != -100
            total += (p.exp() * (p - q)).sum(-1)[trained].sum().item()
            tokens += trained.sum().item()
    return total / tokens


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_the_teacher_is_read_behind_its_own_prompt(build, tokenizer, teacher, lmbda):
    trainer = build(teacher, lmbda=lmbda, learning_rate=0.0, max_steps=1)
    kept = []
    step = trainer.training_step

    def noted(*args, **kwargs):
        kept.append(kl_by_hand(trainer, teacher, tokenizer))
        trainer.model.train()
        return step(*args, **kwargs)

    trainer.training_step = noted
    trainer.train()
    assert logged(trainer, "kl") == pytest.approx(kept, rel=1e-5)


def test_the_same_prompt_is_no_other_run(run, teacher):
    for lmbda in (0.0, 1.0):
        same = run(teacher, rows(hint=""), lmbda=lmbda, folder="same")
        plain = run(teacher, rows().remove_columns("teacher_prompt"), lmbda=lmbda, folder="plain")
        hinted = run(teacher, lmbda=lmbda, folder="hinted")
        assert logged(same, "loss") == logged(plain, "loss") and logged(hinted, "loss") != logged(plain, "loss")
        want = weights(plain.model)
        assert all(torch.equal(mine, want[name]) for name, mine in weights(same.model).items())


def test_an_evaluation_reads_it_too(build, teacher):
    hinted, plain = build(teacher, lmbda=0.0), build(teacher, lmbda=0.0)
    plain.eval_dataset = plain._prepare_dataset(
        rows(3).remove_columns("teacher_prompt"), plain.processing_class, plain.args, False, None, "eval"
    )
    assert hinted.evaluate()["eval_kl"] != plain.evaluate()["eval_kl"]


def test_the_students_own_base_with_hints_is_context_distillation(run, tokenizer):
    trainer = run(lmbda=0.5, sampling_block_size=2, lora=True, teacher_adapter_path="base", max_steps=4)
    base = run(tiny_llama(tokenizer, seed=0), lmbda=0.5, sampling_block_size=2, lora=True, max_steps=4, folder="two")
    assert logged(trainer, "loss") == pytest.approx(logged(base, "loss"), rel=1e-5)


def test_a_cache_is_of_what_the_teacher_reads(run, tmp_path, teacher):
    settings = {"lmbda": 0.0, "num_train_epochs": 2, "max_steps": -1}
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_fill": True}
    filled = run(teacher, folder="filled", **settings, **cache)
    memory = run(teacher, folder="memory", **settings)
    assert logged(filled, "loss") == pytest.approx(logged(memory, "loss"), rel=1e-6)
    again = run(teacher_cache=cache["teacher_cache"], folder="again", **settings)
    assert logged(again, "loss") == pytest.approx(logged(memory, "loss"), rel=1e-6)
    with pytest.raises(ValueError, match="8 of 8 rows of the train dataset are not in the teacher's cache"):
        run(dataset=rows(hint="Another. "), teacher_cache=cache["teacher_cache"], **settings)


def test_what_is_replayed_has_its_hint(build, teacher):
    settings = {"sampling": "adaptive", "adaptive_threshold": 1.0, "replay_capacity": 2, "max_steps": 6}
    trainer = build(teacher, eval_strategy="steps", eval_steps=6, **settings)
    seen = Windows(trainer)
    trainer.train()
    assert "replay" in seen.sources
    for source, (batches, _) in zip(seen.sources, seen.windows, strict=True):
        for batch in batches:
            for i in range(len(batch["input_ids"])):
                text = trainer.processing_class.decode(batch["teacher_input_ids"][i])
                assert HINT.strip() in text, source
                ends = [
                    batch[f"{who}labels"][i][batch[f"{who}labels"][i] != -100].tolist() for who in ("", "teacher_")
                ]
                assert ends[0] == ends[1] != []


def test_a_template_told_otherwise_is_a_prompt_of_the_teachers(run, teacher, tokenizer):
    tokenizer.chat_template = tokenizer.chat_template + "{% if hint is defined %}{{ hint }}{% endif %}"
    plain = rows().remove_columns("teacher_prompt")
    told = run(teacher, plain, lmbda=0.0, teacher_chat_template_kwargs={"hint": "Short:"}, folder="told")
    assert logged(told, "loss") != logged(run(teacher, plain, lmbda=0.0, folder="plain"), "loss")


def test_the_teacher_writes_behind_its_own_prompt(build, teacher):
    trainer = build(teacher, lmbda=0.0, seq_kd=True, max_steps=1)
    writers, read = trainer._parts.writers, []
    write = writers["teacher"]

    class Noting:
        config = write.config

        def __call__(self, prompts, step):
            read.extend(prompts)
            return write(prompts, step)

    writers["teacher"] = Noting()
    trainer.train()
    assert read and all(HINT.strip() in trainer.processing_class.decode(prompt) for prompt in read)


def test_answers_to_prompts_alone_are_judged_behind_the_teachers_prompt(build, teacher):
    questions = rows(3).remove_columns("completion")
    found = []
    for dataset in (questions, questions.remove_columns("teacher_prompt")):
        trainer = build(teacher, lmbda=1.0)
        settings = (trainer.processing_class, trainer.args, False, None, "eval")
        found.append(trainer.evaluate(trainer._prepare_dataset(dataset, *settings)))
    assert found[0]["eval_nll"] == found[1]["eval_nll"] and found[0]["eval_kl"] != found[1]["eval_kl"]
