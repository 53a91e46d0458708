"""AMiDTrainer as a whole: data, evaluation, logs, checkpoints, and what it refuses."""

import copy
import json

import pytest
import torch
from observe import LORA, Windows, dense_loss, logged, weights
from peft import LoraConfig, get_peft_model
from tiny import (
    chat_prompt_completion_dataset,
    chat_prompt_only_dataset,
    messages_dataset,
    multi_turn_dataset,
    pretokenised_dataset,
    prompt_completion_dataset,
    prompt_only_dataset,
    text_dataset,
    tiny_llama,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl._trl import GKDTrainer
from amid_trl.data.batches import DistillationCollator


@pytest.mark.sampled(3)
# ---- Data ----
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("dataset", "lmbda"),
    [
        (messages_dataset, 0.5),
        (multi_turn_dataset, 0.5),
        (prompt_completion_dataset, 0.5),
        (chat_prompt_completion_dataset, 0.5),
        (text_dataset, 0.0),
        (prompt_only_dataset, 1.0),
        (chat_prompt_only_dataset, 1.0),
        (lambda rows: pretokenised_dataset(tiny_tokenizer(), rows), 0.5),
    ],
    ids=["messages", "multi-turn", "prompt+completion", "chat", "text", "prompt-only", "chat prompt", "tokens"],
)
def test_every_format_trains_and_evaluates(train, dataset, lmbda, streaming):
    rows = dataset(8)
    evaluation = messages_dataset(3)
    trainer = train(
        train_dataset=rows.to_iterable_dataset() if streaming else rows,
        eval_dataset=evaluation.to_iterable_dataset() if streaming else evaluation,
        lmbda=lmbda,
        max_steps=2,
        learning_rate=0.0,
    )
    seen = Windows(trainer)
    trainer.train()
    assert len(seen.windows) == 2
    for (batches, _), loss in zip(seen.windows, logged(trainer, "loss"), strict=True):
        [batch] = batches
        assert loss == pytest.approx(dense_loss(trainer, batch).item(), rel=1e-5)
    [batch] = trainer.get_eval_dataloader()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(dense_loss(trainer, batch).item(), rel=1e-5)


def test_a_collator_of_ones_own_gets_the_raw_rows(train, tokenizer):
    seen = []

    def collate(rows):
        seen.extend(rows)
        ids = [tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"] for row in rows]
        return DistillationCollator(tokenizer.pad_token_id)(
            [{"input_ids": row, "labels": row, "prompt_ids": row[:5]} for row in ids]
        )

    trainer = train(data_collator=collate, lmbda=0.5, max_steps=3)
    trainer.train()
    assert set(seen[0]) == {"messages"}
    assert len(logged(trainer, "loss")) == 3


def test_a_collator_without_prompts_is_an_error_when_text_is_generated(train, tokenizer):
    def collate(rows):
        batch = DistillationCollator(tokenizer.pad_token_id)(
            [{k: [5, 6] for k in ("input_ids", "labels", "prompt_ids")}]
        )
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    with pytest.raises(ValueError, match=r"student writes this window.*prompts"):
        train(data_collator=collate, lmbda=1.0).train()


# ---- Evaluation ----
def test_evaluation_weights_every_token_alike(train):
    rows = multi_turn_dataset(5)
    losses = []
    for batch_size in (1, 2, 5):
        trainer = train(eval_dataset=rows, per_device_eval_batch_size=batch_size)
        metrics = trainer.evaluate()
        losses.append((metrics["eval_loss"], metrics["eval_kl"], metrics["eval_nll"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    [batch] = trainer.get_eval_dataloader()
    assert losses[0][0] == pytest.approx(dense_loss(trainer, batch).item(), rel=1e-5)


def test_evaluation_counts_the_cross_entropy_and_nothing_from_before(train):
    trainer = train(eval_dataset=messages_dataset(3), sft_weight=0.5)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    trainer.compute_loss(trainer.model, batch)  # a look at the loss, which the evaluation must not count
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_objective"] + 0.5 * metrics["eval_nll"])
    assert metrics["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


def test_compute_metrics_gets_token_ids_never_logits(train):
    shapes = []

    def accuracy(prediction):
        shapes.append(prediction.predictions.shape)
        trained = prediction.label_ids != -100
        return {"accuracy": float((prediction.predictions == prediction.label_ids)[trained].mean())}

    trainer = train(eval_dataset=messages_dataset(5), compute_metrics=accuracy, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    batches = list(trainer.get_eval_dataloader())
    right = total = 0
    for batch in batches:
        top = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].argmax(-1)
        trained = batch["labels"][:, 1:] != -100
        right += int((top == batch["labels"][:, 1:])[trained].sum())
        total += int(trained.sum())
    assert metrics["eval_accuracy"] == pytest.approx(right / total)
    assert len(shapes[0]) == 2


# ---- Logs, checkpoints, cards ----
def test_logs_name_what_was_trained(train):
    trainer = train(lmbda=1.0, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert {
        "loss", "grad_norm", "learning_rate", "objective", "nll", "kl", "top1_agreement", "student_entropy",
        "teacher_entropy", "on_policy_share", "completions/mean_length", "completions/clipped_ratio",
        "num_input_tokens_seen", "train_tokens_per_second",
    } <= set(entry)  # fmt: skip
    assert entry["on_policy_share"] == 1.0
    assert 0 < entry["completions/mean_length"] <= 6


def test_completions_are_printed_and_saved(train, tmp_path, capsys):
    import pandas as pd

    train(lmbda=1.0, max_steps=1, log_completions=True, num_completions_to_print=1).train()
    table = pd.read_parquet(tmp_path / "run" / "completions" / "completions_00001.parquet")
    assert list(table.columns) == ["step", "prompt", "completion", "source"]
    assert len(table) == 2 and set(table["source"]) == {"student"}
    assert "Completion" in capsys.readouterr().out


def test_the_users_config_is_never_changed(train, tmp_path, student, teacher, tokenizer, tiny_dir):
    config = AMiDConfig(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_steps=1,
        model_init_kwargs={"dtype": "float32"},
        teacher_model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing_kwargs={"use_reentrant": False},
        lmbda=1.0,
        max_new_tokens=4,
        save_strategy="no",
    )
    before = copy.deepcopy(config.to_dict())
    for _ in range(2):  # the second trainer is built from the same config
        AMiDTrainer(
            str(tiny_dir),
            str(tiny_dir),
            config,
            train_dataset=messages_dataset(4).to_iterable_dataset(),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
        ).train()
    assert config.to_dict() == before


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_ends_like_the_uninterrupted_one(train, tmp_path, tokenizer, lora):
    def run(name: str, **extra):
        return train(
            model=tiny_llama(tokenizer),
            output_dir=str(tmp_path / name),
            peft_config=LoraConfig(**LORA, lora_dropout=0.1) if lora else None,
            lmbda=0.5,
            max_steps=6,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=3,
            **extra,
        )

    whole = run("whole")
    whole.train()
    resumed = run("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(w, weights(resumed.model)[name]) for name, w in weights(whole.model).items())
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert logged(resumed, "num_input_tokens_seen") == logged(whole, "num_input_tokens_seen")


def test_a_saved_student_loads_and_its_card_states_the_objective(train, tmp_path, student):
    trainer = train(assistant_alpha=-3.0, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert all(torch.equal(w, weights(loaded)[name]) for name, w in weights(student).items())
    card = (tmp_path / "run" / "README.md").read_text()
    assert 'pipeline("text-generation", model="run", ' in card
    beside = (tmp_path / "student" / "README.md").read_text()
    assert "| `alpha` | `-3.0` |" in beside and 'pipeline("text-generation", model="student", ' in beside
    assert trainer.args.output_dir == str(tmp_path / "run")
    for text in (
        "2510.15982",
        "| `objective` | `amid` |",
        "| `divergence` | `ab(p, r, alpha=0.2, beta=0.7)` |",
        "| `alpha` | `-3.0` |",
        "| `distill_temperature` | `1.0` |",
        "| `sampling temperature` | `0.9` |",
    ):
        assert text in card
    assert json.loads((tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1


def test_the_card_names_student_and_teacher_but_no_folder_above_them(train, tmp_path, tiny_dir, tokenizer):
    teacher = get_peft_model(tiny_llama(tokenizer, seed=1), LoraConfig(target_modules=["q_proj"]))
    train(model=str(tiny_dir), teacher_model=teacher, max_steps=1, save_strategy="steps", save_steps=1).train()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "a fine-tuned version of `model`." in card and "[None]" not in card
    assert "Its teacher was `LlamaForCausalLM`, with an adapter." in card
    assert str(tiny_dir.parent) not in card

    train(teacher_model=str(tiny_dir), max_steps=1, save_strategy="steps", save_steps=1).train()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "a fine-tuned version of `LlamaForCausalLM`." in card and "Its teacher was `model`." in card


def test_it_is_a_gkd_trainer_and_an_sft_trainer(train):
    trainer = train()
    assert isinstance(trainer, GKDTrainer) and isinstance(trainer, SFTTrainer)
    assert (trainer.lmbda, trainer.temperature, trainer.seq_kd) == (0.0, 0.9, False)


def test_a_script_for_gkd_trainer_runs_with_the_names_swapped(tmp_path, tiny_dir):
    # What TRL's examples/scripts/gkd.py does, with a command line's settings.
    parser = TrlParser((ScriptArguments, AMiDConfig, ModelConfig))
    _, training_args, model_args = parser.parse_args_and_config(
        [
            *("--model_name_or_path", str(tiny_dir), "--teacher_model_name_or_path", str(tiny_dir)),
            *("--dataset_name", "chatbot", "--output_dir", str(tmp_path), "--learning_rate", "2e-4"),
            *("--lmbda", "0.5", "--beta", "0.1", "--temperature", "0.8", "--max_new_tokens", "8", "--seq_kd"),
            *("--use_peft", "--lora_r", "8", "--lora_alpha", "16", "--lora_target_modules", "q_proj", "v_proj"),
            *("--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "2", "--gradient_checkpointing"),
            *("--per_device_train_batch_size", "1", "--use_cpu", "--report_to", "none"),
        ]
    )
    quantization_config = get_quantization_config(model_args)
    kwargs = dict(
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
        device_map=None,
        quantization_config=quantization_config,
    )
    training_args.model_init_kwargs = {**kwargs, "use_cache": not training_args.gradient_checkpointing}
    training_args.teacher_model_init_kwargs = {**kwargs, "use_cache": True}
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
    trainer = AMiDTrainer(
        model=model_args.model_name_or_path,
        teacher_model=training_args.teacher_model_name_or_path,
        args=training_args,
        train_dataset=messages_dataset(4),
        eval_dataset=messages_dataset(2),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    assert trainer.state.global_step == 2 and len(logged(trainer, "eval_loss")) == 1
    assert (tmp_path / "adapter_model.safetensors").exists()
