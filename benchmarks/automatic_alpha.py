"""An α that sets itself during training, beside fixed ones: is it worth its rule?

    python benchmarks/automatic_alpha.py

needs what examples/truth/README.md prepares: both pairs, their rows, and the teacher's cache. Before each window a
landscape of the window's own tokens says, for each α of a grid, how much of KL(p‖r)'s gradient pulls the student up
where p > q, and how much pulls it down where p < q. The logarithm of their ratio grows with α; the α is taken whose
ratio is nearest to a target, and the target goes from one end of the grid towards the other along the run: `covering
first` down, `seeking first` up. `middle` holds it half-way. All else is that of the fixed α beside which it is set.

A run that has its file under --runs is not made again, so that several processes can share the work by --pairs,
--budgets and --arms, and it can be made in pieces. automatic_alpha.md and automatic_alpha.json are of what is
there: of the pairs, budgets and arms with every seed.
"""

import argparse
import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from measure import ROOT, about, about_line, in_new_process, replace_file, shown, spread

from amid_trl.choosing.grid import ALPHAS, Grid
from amid_trl.choosing.landscape import landscape
from amid_trl.comparison.intervals import Interval, paired_interval
from amid_trl.comparison.run import ComparedTrainer
from amid_trl.data.batches import Batch, teachers_view
from amid_trl.data.row_teachers import SINGLE
from amid_trl.launch import script
from amid_trl.maths.linear import States
from amid_trl.models.heads import causal_lm, evaluating, language_model_head, states_at, trained_places


LIBRARIES = ("torch", "transformers", "trl", "peft", "amid_trl")
PAIRS = ("24-layers", "18-layers")
BUDGETS = (8, 24)  # steps
LAM = 0.3
# Where the target is, from 0 at the grid's most seeking α to 1 at its most covering one, by the run's progress.
RULES: dict[str, Callable[[float], float]] = {
    "covering first": lambda progress: 1 - progress,
    "seeking first": lambda progress: progress,
    "middle": lambda progress: 0.5,
}
FIXED = {f"α = {alpha:g}": alpha for alpha in (-1.0, 0.5, 3.0)}
ARMS = (*FIXED, *RULES)
METRICS = {"eval_kl": -1, "eval_nll": -1, "eval_top1_agreement": 1}  # which way is better
TOKENS = 64  # of a window that its landscape is of

Record = dict[str, Any]


class AutomaticTrainer(ComparedTrainer):
    """Sets α before each window by one of RULES."""

    def __init__(self, *args: Any, rule: Callable[[float], float], **kwargs: Any):
        self.rule, self.alphas = rule, list[float]()
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The window, and α from its tokens."""
        window, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if window:
            ratios = self.log_ratios(window)
            target = self.rule(self.state.global_step / self.state.max_steps)
            self.alphas.append(ALPHAS[nearest(ratios, target)])
            of_run = self._parts.objectives.by_name[SINGLE]
            of_run.current = replace(of_run.current, alpha=self.alphas[-1])
        return window, count

    def log_ratios(self, window: Sequence[Batch]) -> list[float]:
        """ln (covering / seeking) of each of ALPHAS."""
        base, of_student, answers = causal_lm(self.model), [], []
        teacher: Any = self.teacher
        with evaluating(self.model), torch.no_grad():
            for batch in window:
                of_student.append(states_at(base, *trained_places(batch)))
                answers.append(teacher(teachers_view(batch)))
            heads = language_model_head(base).cut(self.vocabulary), answers[0].head.cut(self.vocabulary)
            states = (
                States(torch.cat(of_student), heads[0]).frozen(),
                States(torch.cat([answer.hidden for answer in answers]), heads[1]).frozen(),
            )
            grid = Grid(("kl",), ("pr",), ALPHAS, (LAM,))
            found = landscape(*states, grid, tokens=TOKENS, seed=self.state.global_step)
        return [math.log(point["covering"] / point["seeking"]) for point in found.points]


def nearest(ratios: Sequence[float], target: float) -> int:
    """Which of them is nearest to the target, 0 at the lowest and 1 at the highest."""
    wanted = min(ratios) + target * (max(ratios) - min(ratios))
    return min(range(len(ratios)), key=lambda i: abs(ratios[i] - wanted))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing; write the page of what there is."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    for seed in args.seeds:
        for pair in args.pairs:
            for budget in args.budgets:
                for arm in args.arms:
                    file = result_file(args.runs, pair, budget, arm, seed)
                    if not file.exists():
                        found = in_new_process(args.threads, measure, pair, budget, arm, seed)
                        file.parent.mkdir(parents=True, exist_ok=True)
                        replace_file(file, json.dumps(found) + "\n")
                        print(pair, budget, arm, seed, found["metrics"], found["alphas"], flush=True)
    command = shlex.join(["python", "benchmarks/automatic_alpha.py", *argv])
    results = {"about": about(command, LIBRARIES, args.threads, "cpu"), **collect(args.runs, args.seeds)}
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "automatic_alpha.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "automatic_alpha.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS)
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, help="steps")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/automatic_alpha")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


def result_file(runs: Path, pair: str, budget: int, arm: str, seed: int) -> Path:
    return runs / f"{pair}-{budget}-{arm.replace(' ', '')}-{seed}.json"


# ---- One run, in a process of its own ----


def measure(pair: str, budget: int, arm: str, seed: int) -> Record:
    """Train and evaluate what examples/truth compares, with another budget and another α."""
    os.chdir(ROOT)  # its paths begin here
    spec = yaml.safe_load((ROOT / f"examples/truth/compare-{pair}.yaml").read_text(encoding="utf-8"))
    settings = {name: value for name, value in spec["base"].items() if name not in ("num_processes", "env")}
    settings |= {"divergence": "kl", "assistant_lambda": LAM, "assistant_alpha": FIXED.get(arm, ALPHAS[0])}
    settings |= {"max_steps": budget, "seed": seed, "disable_tqdm": True}
    rule = RULES.get(arm)
    trainer_class = ComparedTrainer if rule is None else partial(AutomaticTrainer, rule=rule)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.yaml")
        file.write_text(yaml.safe_dump(settings | {"output_dir": folder}), encoding="utf-8")
        parsed = script.parse(["--config", str(file)])
        trainer = script.build_trainer(*parsed, trainer_class=trainer_class, evaluates=True)
        trainer.train()
        metrics = trainer.evaluate()
        return {
            "metrics": {name: metrics[name] for name in METRICS},
            "rows": trainer.evaluated_rows(),
            "alphas": getattr(trainer, "alphas", None),
        }


# ---- What came of them ----


def collect(runs: Path, seeds: Sequence[int]) -> Record:
    """Of each pair and budget the means of the arms, and how far each rule is from the best fixed α."""
    found = []
    for pair in PAIRS:
        for budget in BUDGETS:
            files = {arm: [result_file(runs, pair, budget, arm, seed) for seed in seeds] for arm in ARMS}
            made = {
                arm: [json.loads(file.read_text(encoding="utf-8")) for file in of_arm]
                for arm, of_arm in files.items()
                if all(file.exists() for file in of_arm)
            }
            if FIXED.keys() & made:
                found.append({"pair": pair, "steps": budget, **compared(made)})
    return {"seeds": list(seeds), "lambda": LAM, "found": found}


def compared(made: Mapping[str, Sequence[Record]]) -> Record:
    """The figures of the arms of one pair and budget."""
    arms = {arm: {name: [run["metrics"][name] for run in of_arm] for name in METRICS} for arm, of_arm in made.items()}
    best = {name: best_fixed(arms, name) for name in METRICS}
    rules = [arm for arm in RULES if arm in made]
    differences = {arm: {name: difference(name, made[arm], made[best[name]]) for name in METRICS} for arm in rules}
    alphas = {arm: [run["alphas"] for run in made[arm]] for arm in rules}
    return {"arms": arms, "best": best, "differences": differences, "alphas": alphas}


def best_fixed(arms: Mapping[str, Mapping[str, list[float]]], metric: str) -> str:
    """The fixed α whose mean is the best."""
    return max(FIXED.keys() & arms, key=lambda arm: METRICS[metric] * fmean(arms[arm][metric]))


def difference(metric: str, runs: Sequence[Record], baseline: Sequence[Record]) -> Interval | None:
    """As `amid-trl compare` has it, from runs of the same seeds."""
    tokens = baseline[0]["rows"]["tokens"]
    pairs = [
        (run["rows"]["sums"][metric], base["rows"]["sums"][metric]) for run, base in zip(runs, baseline, strict=True)
    ]
    return paired_interval([[a - b for a, b in zip(*pair, strict=True)] for pair in pairs], tokens)


def report(results: Record) -> str:
    """The results as Markdown."""
    lines = [
        "# An α that sets itself, beside fixed ones",
        "",
        f"KL(p‖r), λ = {results['lambda']}, the two pairs of examples/truth, {len(results['seeds'])} training seeds. "
        "What each rule does is said in `benchmarks/automatic_alpha.py`. Behind a mean stands the deviation over the "
        "seeds; behind a rule's difference from the best of the fixed α (by that metric, chosen afterwards, which "
        "favours it) the interval of 95 % over seeds and rows.",
        "",
        "| pair | steps | α | KL(p‖q) | - best fixed | NLL | - best fixed | top-1 agreement | - best fixed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in results["found"]:
        for arm in each["arms"]:
            cells = [each["pair"].replace("-", " "), str(each["steps"]), arm]
            for name in METRICS:
                cells += [spread(each["arms"][arm][name], 3), shown(each["differences"].get(arm, {}).get(name))]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "The α of the first seed, window by window:", ""]
    for each in results["found"]:
        for arm in each["alphas"]:
            taken = ", ".join(f"{alpha:g}" for alpha in each["alphas"][arm][0])
            lines.append(f"- {each['pair'].replace('-', ' ')}, {each['steps']} steps, {arm}: {taken}")
    return "\n".join([*lines, "", about_line(results["about"]), ""])


if __name__ == "__main__":
    main()
