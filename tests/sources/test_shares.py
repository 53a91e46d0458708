"""Where the text of a run comes from: shares, DistiLLM's adaptive share, replay; and that all of it is resumed."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from observe import Windows, completions_of, logged, weights
from tiny import messages_dataset, tiny_llama

from amid_trl import AMiDConfig
from amid_trl.data.batches import PromptTokens
from amid_trl.run import Run
from amid_trl.sources.shares import WindowSources


ADAPTIVE = {
    "sampling": "adaptive",
    "adaptive_threshold": 0.7,
    "replay_capacity": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "lmbda": 0.5,
}


@pytest.fixture
def adaptive(train):
    def build(**settings):
        return train(**{**ADAPTIVE, "eval_dataset": messages_dataset(2), **settings})

    return build


def sources(*, full=False, **settings) -> WindowSources:
    """A process among others, of which one has a full buffer only if `full`."""
    others = SimpleNamespace(
        process_index=0, device=torch.device("cpu"), reduce=lambda mine, reduction: (mine + float(full)) / 2
    )
    config = AMiDConfig(output_dir="unused", use_cpu=True, per_device_train_batch_size=2, **settings)
    return WindowSources(Run(config, others, tokenizer=None, vocabulary=0, positions=None))


def rows_of(window) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of every row, without padding."""
    batches, _ = window
    return [
        (ids[mask == 1].tolist(), labels[mask == 1].tolist())
        for batch in batches
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]


def change_dev_loss(trainer, change) -> None:
    """Let every evaluation report `change(dev loss)` for the dev loss."""
    evaluation_loop = trainer.evaluation_loop

    def report(*args, **kwargs):
        output = evaluation_loop(*args, **kwargs)
        output.metrics["eval_nll"] = change(output.metrics["eval_nll"])
        return output

    trainer.evaluation_loop = report


def sources_of(seen: Windows) -> list[str]:
    return seen.sources


# ---- Shares ----


def test_the_students_share_follows_its_schedule():
    steps = 20_000
    run = sources(lmbda_schedule={"kind": "linear", "start": 0.2, "end": 1.0})
    written = [run.choose(step, steps) == "student" for step in range(steps)]
    for quarter, mean in enumerate((0.3, 0.5, 0.7, 0.9)):  # of a line from 0.2 to 1
        share = sum(written[quarter * 5000 :][:5000]) / 5000
        # Standard deviation of a share: at most sqrt(0.25 / 5000) = 0.0071; five of them.
        assert abs(share - mean) < 0.036
    assert run.figures == {"lmbda": pytest.approx(0.2 + 0.8 * 19_999 / 20_000)}


@pytest.mark.parametrize("seq_kd", [False, True])
def test_blocks_have_their_share_exactly(seq_kd):
    run = sources(lmbda=0.3, sampling_block_size=10, seq_kd=seq_kd)
    for block in range(50):
        counts = Counter(run.choose(10 * block + i, 500) for i in range(10))
        assert counts == {"student": 3, "teacher" if seq_kd else "dataset": 7}
    plain = sources(lmbda=0.3)
    assert len({sum(plain.choose(10 * block + i, 500) == "student" for i in range(10)) for block in range(50)}) > 3


@pytest.mark.parametrize(("replay_share", "fresh"), [("constant", 0.3), ("increasing", 0.3), ("decreasing", 0.3)])
@pytest.mark.parametrize("full", [True, False])
def test_an_adaptive_run_has_distillms_shares(replay_share, fresh, full):
    steps = 10_000
    run = sources(full=full, **{**ADAPTIVE, "adaptive_threshold": 0.6, "replay_share": replay_share})
    row = [torch.tensor([1])] * 8
    run.remember([*map(PromptTokens, row)], row)  # this process's own buffer is full
    chosen = [run.choose(step, steps) for step in range(steps)]
    counts = Counter(chosen)
    # Averages over the run; without one full buffer on every process nothing is replayed. Five standard deviations.
    wanted = {"student": fresh if full else 0.6, "replay": 0.6 - fresh if full else 0, "dataset": 0.4}
    for source, share in wanted.items():
        assert abs(counts[source] / steps - share) < 0.025
    first, last = (Counter(part)["replay"] for part in (chosen[:2000], chosen[-2000:]))
    if full and replay_share != "constant":
        assert (last > first) == (replay_share == "decreasing")


def test_distillm_counts_the_window_itself():
    run = sources(full=True, **{**ADAPTIVE, "adaptive_threshold": 1.0})
    row = [torch.tensor([1])] * 8
    run.remember([*map(PromptTokens, row)], row)
    assert run.choose(0, 1) == "replay"  # g = 1 of G = 1: nothing is written anew


def test_a_schedule_moves_the_share_in_training_and_is_logged(train):
    trainer = train(lmbda=0.5, lmbda_schedule={"kind": "linear", "start": 0.0, "end": 1.0}, max_steps=8)
    seen = Windows(trainer)
    trainer.train()
    assert logged(trainer, "lmbda") == [step / 8 for step in range(8)]
    assert logged(trainer, "on_policy_share") == [source == "student" for source in sources_of(seen)]
    assert set(sources_of(seen)) == {"student", "dataset"}


def test_a_constant_share_is_not_logged(train):
    trainer = train(lmbda_schedule={"kind": "constant", "value": 1.0}, lmbda=0.5, max_steps=1)
    trainer.train()
    assert logged(trainer, "on_policy_share") == [1.0]
    assert not logged(trainer, "lmbda") and not logged(trainer, "replay_share")


# ---- DistiLLM's adaptive share ----


def test_the_threshold_follows_the_evaluations_of_the_run(adaptive):
    trainer = adaptive(adaptive_threshold=0.0, adaptive_tolerance=0.5, adaptive_step=0.25, eval_steps=1, max_steps=6)
    # Before training 3; a rise by 0.5 counts, from 3, then from 3.5, then from 4.25.
    dev_losses = iter([3.0, 3.4, 3.5, 3.9, 4.25, 1.0, 4.7])
    change_dev_loss(trainer, lambda _: next(dev_losses))
    trainer.train()
    assert logged(trainer, "adaptive_threshold") == [0, 0, 0.25, 0.25, 0.5, 0.5]
    assert trainer._parts.sources.figures == {"adaptive_threshold": 0.5}
    assert next(dev_losses, None) is None


def test_the_dev_loss_is_the_students_cross_entropy_before_the_first_step(adaptive):
    trainer = adaptive(max_steps=1)
    want = trainer.evaluate()["eval_nll"]
    trainer.evaluate()  # outside training: not followed
    assert trainer._parts.sources.needs_evaluation
    trainer.train()
    assert trainer._parts.sources.state_dict()["adaptive"]["reference"] == pytest.approx(want, rel=1e-6)
    assert logged(trainer, "eval_nll")[0] == pytest.approx(want, rel=1e-6)


def test_replayed_rows_are_those_that_the_student_wrote_token_for_token(adaptive):
    trainer = adaptive(
        adaptive_threshold=1.0, replay_capacity=6, max_steps=12, gradient_accumulation_steps=2, sft_weight=0.5
    )
    seen, remembered, remember = Windows(trainer), [], trainer._parts.sources.remember

    def remember_too(prompts, completions):
        rows = zip(prompts, completions, strict=True)
        remembered.append([[*prompt.ids.tolist(), *completion.tolist()] for prompt, completion in rows])
        remember(prompts, completions)

    trainer._parts.sources.remember = remember_too
    trainer.train()
    chosen, fresh, written = sources_of(seen), iter(remembered), []
    assert chosen[0] == "student" and Counter(chosen)["replay"] >= 3
    for source, window in zip(chosen, seen.windows, strict=True):
        rows = rows_of(window)
        if source == "student":
            in_order = next(fresh)  # the window's own rows, which are dealt by length afterwards
            written.extend(sorted(rows, key=lambda row: in_order.index(row[0])))
        else:
            assert all(row in written[-6:] for row in rows)  # the newest rows, as many as there is room for
            assert len({tuple(ids) for ids, _ in rows}) == 4
        assert int(window[1]) == sum(map(len, completions_of(window)))
    kept = trainer._parts.sources.state_dict()["replay"]
    assert [ids.tolist() for ids in kept["ids"].split(kept["lengths"].sum(1).tolist())] == [
        ids for ids, _ in written[-6:]
    ]
    assert logged(trainer, "on_policy_share") == [source == "student" for source in chosen]
    assert logged(trainer, "replay_share") == [source == "replay" for source in chosen]
    # The cross-entropy joins on neither.
    assert logged(trainer, "loss") == pytest.approx(logged(trainer, "objective"), rel=1e-5)


def test_a_replayed_window_writes_nothing(adaptive, student):
    calls = []
    generate = type(student).generate
    student.generate = lambda *args, **kwargs: calls.append(1) or generate(student, *args, **kwargs)
    trainer = adaptive(adaptive_threshold=1.0, max_steps=10)
    seen = Windows(trainer)
    trainer.train()
    assert len(calls) == Counter(sources_of(seen))["student"] < 10


# ---- Resuming ----

MOVING = {
    "assistant_alpha_schedule": {"kind": "cosine", "start": -5.0, "end": 1.0},
    "lmbda_schedule": {"kind": "linear", "start": 1.0, "end": 0.0},
    "lmbda": 0.5,
}
TAID = {"objective": "taid", "assistant_lambda_schedule": {"kind": "taid", "rate": 0.1, "momentum": 0.5}}
RESUMED = {
    "mixed": MOVING,
    "exact share": {"lmbda": 0.5, "sampling_block_size": 4},
    "adaptive": {**ADAPTIVE, "adaptive_threshold": 0.5, "adaptive_step": 0.07},
    "adaptive, evaluated at the start": {**ADAPTIVE, "adaptive_tolerance": 0.0, "adaptive_step": 0.07},
    "taid": TAID,
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(train, tmp_path, tokenizer, name):
    def run(folder: str, **settings):
        trainer = train(
            model=tiny_llama(tokenizer),
            output_dir=str(tmp_path / folder),
            eval_dataset=messages_dataset(2),
            max_steps=12,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=5,
            **{**RESUMED[name], **settings},
        )
        change_dev_loss(trainer, lambda loss: loss + trainer.state.global_step)  # so that the threshold goes on rising
        return trainer, Windows(trainer)

    whole, first = run("whole")
    whole.train()
    resumed, second = run("resumed", **({"eval_on_start": True} if name.endswith("start") else {}))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert [rows_of(window) for window in second.windows] == [rows_of(window) for window in first.windows[5:]]
    assert sources_of(second) == sources_of(first)[5:]
    for figure in ("loss", "grad_norm", "adaptive_threshold", "assistant_alpha", "assistant_lambda", "replay_share"):
        assert logged(resumed, figure) == logged(whole, figure)  # the checkpoint brings the first five along
    assert all(torch.equal(w, weights(resumed.model)[name]) for name, w in weights(whole.model).items())
    if name == "adaptive":
        assert len(set(logged(whole, "adaptive_threshold")[5:])) > 1
        assert "replay" in sources_of(second)


def test_a_checkpoint_holds_no_pickled_objects(adaptive, tmp_path):
    trainer = adaptive(max_steps=4, adaptive_threshold=1.0, save_strategy="steps", save_steps=4)
    trainer.train()
    state = torch.load(tmp_path / "run" / "checkpoint-4" / "distillation_state_0.pt", weights_only=True)
    assert set(state) == {"processes", "adaptive", "replay"}
    assert len(state["replay"]["lengths"]) == 4


def test_a_run_without_such_state_writes_none_and_cannot_be_resumed_as_one_with_it(train, adaptive, tmp_path):
    train(max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert not list(checkpoint.glob("distillation_state*"))
    with pytest.raises(ValueError, match=r"checkpoint-1 holds no state called adaptive, replay: it was saved with"):
        adaptive(output_dir=str(tmp_path / "next")).train(resume_from_checkpoint=str(checkpoint))


def test_a_smaller_buffer_takes_over_the_newest_rows(adaptive, tmp_path):
    trainer = adaptive(max_steps=3, adaptive_threshold=1.0, save_strategy="steps", save_steps=3)
    trainer.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    smaller = adaptive(max_steps=3, adaptive_threshold=1.0, replay_capacity=2)
    smaller.train(resume_from_checkpoint=checkpoint)
    rows = [trainer._parts.sources.state_dict()["replay"], smaller._parts.sources.state_dict()["replay"]]
    assert torch.equal(rows[0]["lengths"][-2:], rows[1]["lengths"])
    assert torch.equal(rows[0]["ids"][-int(rows[1]["lengths"].sum()) :], rows[1]["ids"])


# ---- Refused before the first step ----


def test_several_evaluation_sets_are_refused(adaptive):
    rows = messages_dataset(2)
    with pytest.raises(ValueError, match="sampling='adaptive' follows one evaluation set; got first, second"):
        adaptive(eval_dataset={"first": rows, "second": rows})


def test_an_adaptive_run_needs_an_evaluation_set(adaptive):
    with pytest.raises(ValueError, match="didn't pass an `eval_dataset`"):
        adaptive(eval_dataset=None)


def test_a_run_that_mixes_sources_logs_the_figures_of_each(train):
    trainer = train(lmbda=0.5, sampling_block_size=2, max_steps=4, logging_steps=2, learning_rate=1e-12)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:  # one window of each
        for name in ("kl", "objective"):
            low, high = sorted((entry[f"{name}/student"], entry[f"{name}/dataset"]))
            assert low < entry[name] < high
    assert logs[0]["kl/student"] != logs[0]["kl/dataset"]


def test_the_figures_of_a_source_that_the_settings_do_not_name_are_logged(train, monkeypatch):
    """As those of a new one: `next_source` decides, nothing else."""
    monkeypatch.setattr("amid_trl.sources.shares.next_source", lambda u, **_: "student" if u < 0.5 else "teacher")
    trainer = train(lmbda=0.5, sampling_block_size=2, logging_steps=2)
    trainer._parts.writers["teacher"] = trainer._parts.writers["student"]
    trainer.train()
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("kl", "objective"):
        low, high = sorted((entry[f"{name}/student"], entry[f"{name}/teacher"]))
        assert low < entry[name] < high


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_run_with_one_source_has_no_figures_of_sources(train, lmbda):
    trainer = train(lmbda=lmbda)
    trainer.train()
    assert not [
        name for entry in trainer.state.log_history for name in entry if name.startswith(("kl/", "objective/"))
    ]
