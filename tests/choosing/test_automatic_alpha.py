"""The rule that sets α during training, which benchmarks/automatic_alpha.py sets beside fixed ones."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import messages_dataset, tiny_llama

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.maths.assistant import alpha_mixture


ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import automatic_alpha

    return automatic_alpha


@pytest.fixture
def automatic(benchmark, tmp_path, tokenizer, teacher):
    def build(rule, alpha=-5.0):
        args = AMiDConfig(
            str(tmp_path),
            divergence="kl",
            assistant_lambda=benchmark.LAM,
            assistant_alpha=alpha,
            per_device_train_batch_size=2,
            max_steps=4,
            learning_rate=1e-3,
            lmbda=0.0,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        given = {"processing_class": tokenizer, "train_dataset": messages_dataset(8)}
        if rule is None:
            return AMiDTrainer(tiny_llama(tokenizer), teacher, args, **given)
        return benchmark.AutomaticTrainer(tiny_llama(tokenizer), teacher, args, **given, rule=rule)

    return build


def test_the_nearest_ratio_to_the_target_is_taken(benchmark):
    ratios = [-1.0, -0.2, 0.4, 1.0]
    assert [benchmark.nearest(ratios, target) for target in (0, 0.45, 0.65, 1)] == [0, 1, 2, 3]


def test_the_ratio_is_that_of_the_gradient_on_the_logits(benchmark, automatic):
    trainer = automatic(lambda progress: 0.5)
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer.log_ratios([batch])
    trained = batch["labels"][:, 1:] != -100
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        student, teacher = (
            model(**given).logits[:, :-1][trained].double() for model in (trainer.model, trainer.teacher_model)
        )
    p, q = teacher.softmax(-1), student.softmax(-1)
    for alpha, ratio in zip(benchmark.ALPHAS, found, strict=True):
        logits = student.clone().requires_grad_()
        log_r = alpha_mixture(teacher.log_softmax(-1), logits.log_softmax(-1), alpha=alpha, lam=benchmark.LAM)
        (p * (p.log() - log_r)).sum().backward()
        up, down = (-logits.grad).clamp(min=0)[p > q].sum(), logits.grad.clamp(min=0)[p < q].sum()
        assert ratio == pytest.approx(math.log(up / down), abs=1e-4)


def test_alpha_goes_from_one_end_to_the_other_and_is_what_is_trained_with(benchmark, automatic):
    trainer = automatic(benchmark.RULES["covering first"])
    trainer.train()
    assert len(trainer.alphas) == 4 and trainer.alphas[0] == benchmark.ALPHAS[-1]
    assert trainer.alphas == sorted(trainer.alphas, reverse=True) and trainer.alphas[-1] < trainer.alphas[0]

    held, fixed = automatic(lambda progress: 1.0), automatic(None, alpha=benchmark.ALPHAS[-1])
    held.train()
    fixed.train()
    assert set(held.alphas) == {benchmark.ALPHAS[-1]}
    for one, other in zip(held.model.parameters(), fixed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_rule_is_set_beside_the_best_fixed_alpha(benchmark, tmp_path):
    """Of invented runs: the rules are better by 0.5 nats than the best of the fixed ones, which is the first."""
    for pair in benchmark.PAIRS:
        for place, arm in enumerate(benchmark.ARMS):
            for seed in (0, 1):
                kl = 1.0 + place if arm in benchmark.FIXED else 0.5
                figures = {"eval_kl": kl, "eval_nll": kl, "eval_top1_agreement": 1 / kl}
                sums = {name: [2 * figure, 3 * figure] for name, figure in figures.items()}
                run = {"metrics": figures, "rows": {"tokens": [2, 3], "sums": sums}, "alphas": [3.0, -5.0]}
                benchmark.result_file(tmp_path, pair, 8, arm, seed).write_text(json.dumps(run))
    benchmark.result_file(tmp_path, "18-layers", 8, "middle", 1).unlink()
    found = benchmark.collect(tmp_path, (0, 1))
    assert [(each["pair"], each["steps"]) for each in found["found"]] == [(pair, 8) for pair in benchmark.PAIRS]
    assert "middle" not in found["found"][1]["arms"], "it lacks a seed"
    of_pair = found["found"][0]
    assert set(of_pair["best"].values()) == {"α = -1"}
    assert of_pair["differences"]["middle"]["eval_kl"] == pytest.approx((-0.5, -0.5, -0.5))
    assert of_pair["differences"]["middle"]["eval_top1_agreement"] == pytest.approx((1.0, 1.0, 1.0))
    page = benchmark.report({"about": benchmark.about("command", (), 1, "cpu"), **found})
    assert "| 24 layers | 8 | middle | 0.500 ± 0.000 | -0.500 (-0.500 to -0.500) |" in page
    assert "- 18 layers, 8 steps, covering first: 3, -5" in page


def test_the_page_says_what_was_found(benchmark):
    results = json.loads((ROOT / "benchmarks/results/automatic_alpha.json").read_text())
    assert benchmark.report(results) == (ROOT / "benchmarks/results/automatic_alpha.md").read_text()
    page = (ROOT / "docs/choosing.md").read_text()
    one, other = (each for each in results["found"] if each["steps"] == 8)
    assert set(one["best"].values()) | set(other["best"].values()) <= set(benchmark.FIXED)
    assert one["best"]["eval_kl"] == other["best"]["eval_kl"] == "α = 0.5"
    for arm, shown in {
        "covering first": "covering first",
        "seeking first": "seeking first",
        "middle": "half-way",
    }.items():
        cells = [shown]
        for pair in (one, other):
            cells.append(f"{sum(pair['arms'][arm]['eval_kl']) / 3:.3f}")
            cells.append(benchmark.shown(pair["differences"][arm]["eval_kl"]))
        assert f"| {' | '.join(cells)} |" in page
    for arm in benchmark.FIXED:
        means = [f"{sum(pair['arms'][arm]['eval_kl']) / 3:.3f}" for pair in (one, other)]
        [row] = [line for line in page.splitlines() if line.startswith(f"| {arm}")]
        assert all(f"| {mean} |" in row for mean in means)
    [longer] = [each for each in results["found"] if each["steps"] == 24]
    for name in ("covering first", "seeking first"):
        assert f"{sum(longer['arms'][name]['eval_kl']) / 3:.3f}" in page
        assert benchmark.shown(longer["differences"][name]["eval_kl"]) in page
