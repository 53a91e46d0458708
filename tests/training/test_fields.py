"""The fields of AMiDConfig whose effect no other test shows; test_config.py lists which test shows which."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import messages_dataset, multi_turn_dataset, tiny_llama
from transformers import LlamaForCausalLM, PreTrainedModel

import amid_trl.sources.writers
from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.maths import linear


@pytest.fixture
def build(tmp_path, tokenizer, student, teacher):
    def make(dataset=None, teacher_model=None, **settings) -> AMiDTrainer:
        config = AMiDConfig(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
            max_steps=1,
            max_new_tokens=4,
            per_device_train_batch_size=2,
            **settings,
        )
        rows = dataset if dataset is not None else messages_dataset(4)
        return AMiDTrainer(student, teacher_model or teacher, config, train_dataset=rows, processing_class=tokenizer)

    return make


def trained_text(trainer: AMiDTrainer, tokenizer) -> list[str]:
    rows = trainer.train_dataset["labels"]
    return [tokenizer.decode([token for token in row if token != -100]) for row in rows]


def test_the_chunk_size_bounds_the_projection(build, monkeypatch):
    tokens = []
    project = linear.Head.project
    monkeypatch.setattr(
        linear.Head, "project", lambda head, hidden, out: tokens.append(len(hidden)) or project(head, hidden, out)
    )
    build(lmbda=0.0, logits_chunk_size=3).train()
    assert max(tokens) == 3 and len(tokens) > 4
    tokens.clear()
    build(lmbda=0.0).train()
    assert len(tokens) == 2  # one chunk: one projection of each model


class Writer:
    """In the place of TensorBoard's: what transformers' callback writes, by name."""

    def __init__(self, log_dir):
        self.scalars, self.texts = {}, {}
        Writer.last = self

    def add_scalar(self, name, value, step):
        self.scalars.setdefault(name, []).append(value)

    def add_text(self, name, text, step=None):
        self.texts[name] = text

    def flush(self):
        """Nothing waits."""

    close = flush


def test_figures_and_settings_arrive_in_a_tracker(tmp_path, student, teacher, tokenizer, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    settings = {"max_steps": 1, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_new_tokens": 4}
    settings |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "log_completions": True}
    config = AMiDConfig(str(tmp_path), lmbda=1.0, assistant_alpha=-0.5, report_to="tensorboard", **settings)
    rows = {"train_dataset": messages_dataset(4), "eval_dataset": messages_dataset(2)}
    AMiDTrainer(student, teacher, config, processing_class=tokenizer, **rows).train()
    names = ("objective", "nll", "kl", "top1_agreement", "student_entropy", "teacher_entropy")
    assert {f"{split}/{name}" for split in ("train", "eval") for name in names} <= set(Writer.last.scalars)
    others = ("on_policy_share", "completions/mean_length", "completions/clipped_ratio", "memory/student_gib")
    assert {f"train/{name}" for name in others} <= set(Writer.last.scalars)
    told = json.loads(Writer.last.texts["args"])
    assert (told["assistant_alpha"], told["objective"], told["lmbda"]) == (-0.5, "amid", 1.0)
    assert Writer.last.texts["completions"].startswith("| step | prompt | completion | source |\n")


def test_the_revision_of_the_teacher_is_asked_for(build, tiny_dir, monkeypatch):
    asked = []

    def from_pretrained(cls, *args, **kwargs):
        asked.append(kwargs.get("revision"))
        return PreTrainedModel.from_pretrained.__func__(cls, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(from_pretrained))
    build(teacher_model=str(tiny_dir), teacher_model_revision="v2", lmbda=0.0)
    assert asked == ["v2"]


def test_only_the_last_turn_is_trained_if_asked_for(build, tokenizer):
    rows = multi_turn_dataset(2)
    answers = [[turn["content"] for turn in row["messages"] if turn["role"] == "assistant"] for row in rows]
    both = trained_text(build(rows, lmbda=0.0), tokenizer)
    last = trained_text(build(rows, lmbda=0.0, assistant_turns="last"), tokenizer)
    assert both == [f"{first}<|im_end|>{second}<|im_end|>" for first, second in answers]
    assert last == [f"{second}<|im_end|>" for _, second in answers]


def test_chat_template_kwargs_reach_the_template(build, tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- if add_generation_prompt %}", "{%- if add_generation_prompt and not quiet %}"
    )
    loud = build(lmbda=1.0).train_dataset["prompt_ids"][0]
    quiet = build(lmbda=1.0, chat_template_kwargs={"quiet": True}).train_dataset["prompt_ids"][0]
    assert tokenizer.decode(loud) == tokenizer.decode(quiet) + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.5),
        ("top_p", 0.8),
        ("top_k", 7),
        ("min_p", 0.05),
        ("repetition_penalty", 1.3),
        ("cache_implementation", "static"),
        ("max_new_tokens", 4),
        ("generation_kwargs", {"no_repeat_ngram_size": 2}),
    ],
)
def test_sampling_fields_reach_the_generation_config(build, name, value):
    settings = {} if name == "max_new_tokens" else {name: value}
    trainer = build(lmbda=1.0, **settings)
    used = []
    generate = type(trainer.model).generate
    trainer.model.generate = lambda **kwargs: (
        used.append(kwargs["generation_config"]) or generate(trainer.model, **kwargs)
    )
    trainer.train()
    wanted = value if isinstance(value, dict) else {name: value}
    assert {key: getattr(used[0], key) for key in wanted} == wanted


def test_generation_kwargs_win(build):
    trainer = build(lmbda=1.0, top_k=7, generation_kwargs={"top_k": 3, "eos_token_id": 5})
    assert trainer.generation_config.top_k == 3
    assert trainer.generation_config.eos_token_id == [5]


def test_gathering_for_generation_is_passed_on(build, monkeypatch):
    seen = []
    unwrap = amid_trl.sources.writers.unwrapped_for_generation

    def remember(*args, gather_deepspeed3_params, **kwargs):
        seen.append(gather_deepspeed3_params)
        return unwrap(*args, gather_deepspeed3_params=gather_deepspeed3_params, **kwargs)

    monkeypatch.setattr(amid_trl.sources.writers, "unwrapped_for_generation", remember)
    build(lmbda=1.0, ds3_gather_for_generation=False).train()
    build(lmbda=1.0).train()
    assert seen == [False, True]


@pytest.mark.parametrize("rows", [1, None])
def test_the_printed_table_has_the_rows_asked_for(build, capsys, rows):
    build(lmbda=1.0, log_completions=True, num_completions_to_print=rows, logging_steps=1).train()
    printed = capsys.readouterr().out
    assert printed.count("What is") + printed.count("How many") + printed.count("Is ") >= 1
    assert printed.count("├") == (0 if rows == 1 else 1)


def test_eos_is_the_union_of_tokenizer_and_generation_config(build, student, tokenizer):
    student.generation_config.eos_token_id = [7, 8]
    trainer = build(lmbda=1.0)
    assert sorted(trainer.generation_config.eos_token_id) == sorted([7, 8, tokenizer.eos_token_id])


def test_sfts_formatting_options_are_honoured(tmp_path, tokenizer, student, teacher):
    from datasets import Dataset

    config = AMiDConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        lmbda=0.0,
        dataset_text_field="body",
        shuffle_dataset=True,
    )
    rows = Dataset.from_list([{"body": f"Rain fell on bridge {i}."} for i in range(8)])
    trainer = AMiDTrainer(student, teacher, config, train_dataset=rows, processing_class=tokenizer)
    texts = [tokenizer.decode(ids) for ids in trainer.train_dataset["input_ids"]]
    assert sorted(texts) == [f"Rain fell on bridge {i}.<|im_end|>" for i in range(8)]
    assert texts != sorted(texts)

    upper = AMiDTrainer(
        tiny_llama(tokenizer),
        teacher,
        config,
        train_dataset=rows,
        processing_class=tokenizer,
        formatting_func=lambda row: row["body"].upper(),
    )
    assert tokenizer.decode(upper.train_dataset["input_ids"][0]).startswith("RAIN FELL ON BRIDGE")


def test_torch_is_not_asked_to_hold_the_logits(build, student):
    # The student's own forward, which would return them, is never called while training on the dataset.
    trainer = build(lmbda=0.0)
    student.lm_head.register_forward_hook(lambda *_: pytest.fail("the head projected every position"))
    trainer.train()
    assert torch.isfinite(next(student.parameters())).all()
