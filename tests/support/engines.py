"""What two processes run under an engine, and what must hold of it whichever engine that is."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import engine_worker
import pytest
import torch
from processes import run_ranks

from amid_trl.cli import main
from amid_trl.models.loading import load_causal_lm
from amid_trl.training.checkpoints import saved_under


ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
FIGURES = ("loss", "grad_norm", "kl", "nll", "student_entropy", "pretrain_nll", "assistant_lambda", "aux_loss")
FIGURES += (
    "kl/math",
    "kl/chat",
    "eval_kl/math",
    "eval_kl/chat",
    "eval_loss",
    "eval_kl",
    "eval_rougeL",
    "eval_completions/mean_length",
)


# ---- Cases: the settings of engine_worker.run ----

# Trained under every engine as in one process.
TRAINED = {
    "full": {"eval_on_start": True, "eval_generate": True},
    "evaluated before": {"evaluates_first": True},
    "tied head, without checkpointing": {"student": "tied_student", "gradient_checkpointing": False},
    # Nothing is trained in the first window on the second process, in the second on any, and in the third in its first
    # micro-batches.
    "silent rows": {"silent": [1, 3, 4, 5, 6, 7, 8, 9]},
    "cached states of the teacher": {"teacher_cache": "cache", "teacher_cache_states": True},
    # In the second epoch each process has rows that the other has kept.
    "filled cache": {
        "teacher_cache": "cache",
        "teacher_cache_fill": True,
        "num_train_epochs": 2,
        "train_sampling_strategy": "random",
    },
    "balanced experts": {"student": "mixture", "router_aux_loss_coef": 0.5},
    "student's text": {"lmbda": 1.0, "asks": True},  # evaluated on prompts alone
    "student's text, lora": {"lmbda": 1.0, "lora": {}},
    "teacher's text": {"seq_kd": True},
    # The first process has rows of one alone, the second of the other.
    "two teachers": {
        "teachers": {
            "math": {"teacher_model_name_or_path": "teacher"},
            "chat": {"teacher_model_name_or_path": "tied_student", "objective": "kd"},
        }
    },
    "lora, embeddings and head": {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}},
    "adapter, head": {"student": "adapter"},
    "shared base, head": {"teacher": None, "lora": {}, "teacher_adapter_path": "adapter"},
}
# Likewise; with the quick tests under DDP alone.
TRAINED_LATER = {
    "cross-entropy, uneven last window": {"sft_weight": 0.5, "rows": 14},
    "plain text": {"pretrain_dataset": "same_text", "pretrain_weight": 0.7, "max_length": 80},
    "cached teacher": {"teacher_cache": "cache", "teacher_top_k": 20},
    "student's text, remote teacher": {
        **{"lmbda": 1.0, "asks": True},
        **{"teacher": None, "teacher_model_server_url": "states_server"},
    },
    "prompts of the teachers": {"hints": True, "lmbda": 1.0},
    "teacher with another tokenizer": {"teacher": "other_teacher"},
    "lora, reentrant": {
        "lora": {},
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "ddp_find_unused_parameters": False,  # otherwise DDP counts twice what is computed again
    },
    "selected tokens": {"objective": "rkl", "token_selection": "tip", "token_selection_share": 0.4},
    # Two rows in each process, without their padding; alone they are padded.
    "without padding": {
        **{"padding_free": True, "student": "mixture", "router_aux_loss_coef": 0.5},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
    },
    "two teachers, student's text, lora": {
        "teachers": {
            "math": {"teacher_model_name_or_path": "teacher"},
            "chat": {"teacher_adapter_path": "adapter"},
        },
        **{"lmbda": 1.0, "asks": True, "lora": {}},
    },
    "student's text, teacher with another tokenizer": {"teacher": "other_teacher", "lmbda": 1.0},
}
# Where every process has all of the weights, this is no different.
TRAINED_IN_PARTS = {
    # Before any loss, so that the head is first used as a module of its own.
    "student's text, sharded": {"lmbda": 1.0, "asks": True, "ds3_gather_for_generation": False},
    "adapter": {"student": "tied_adapter"},
    "shared base": {"student": "tied_student", "teacher": None, "lora": {}, "teacher_adapter_path": "tied_adapter"},
}
# These differ by what the processes tell each other, not by who holds the weights.
TRAINED_UNDER_DDP = {
    # Here λ follows the loss alone: at this rate it is ahead of the line from start to end.
    "taid": {
        "objective": "taid",
        "assistant_lambda_schedule": {"kind": "taid", "start": 0.2, "rate": 1.0, "momentum": 0.0},
        "rows": 16,
    },
    "lora": {"lora": {}},
    "packed rows": {"packing": True, "max_length": 76, "rows": 24},  # twelve bins
    "served teacher": {"teacher": None, "teacher_model_server_url": "server", "teacher_top_k": 20},
    "caches of two teachers": {
        "teachers": {
            name: {"teacher_model_name_or_path": model, "teacher_cache": name, "teacher_cache_fill": True}
            for name, model in (("math", "teacher"), ("chat", "tied_student"))
        },
        "num_train_epochs": 2,
        "train_sampling_strategy": "random",
    },
    # One process writes to the first and the third row of a window of four, two to the first and the second.
    "two completions for a prompt": {
        "lmbda": 1.0,
        "num_generations": 2,
        "rows": [0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 0],
    },
}
TRAINED_UNDER_FSDP2 = {
    "clipped": {"max_grad_norm": 0.1},
    "layers of another class": {"student": "gpt2"},
    "checkpointed by FSDP2": {"gradient_checkpointing": False, "fsdp_config": {"activation_checkpointing": True}},
    "adapter as teacher": {"teacher": "tied_adapter"},
    "layers by name": {"teacher": "gpt2", "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}},
    "loaded once": {"fsdp_config": {"cpu_ram_efficient_loading": True}},
}
# Needs weights that are whole.
AVERAGED = {"moving average": {"teacher": None, "teacher_ema": 0.5, "sft_weight": 0.5}}
MERGED = {"adapter on an adapter": {"student": "adapter", "lora": {}}}
EVALUATED = {"evaluated alone": {"trains": False}}
# What one process does as well; it is told nothing of how two share their work.
REFERENCES = (
    TRAINED
    | TRAINED_LATER
    | TRAINED_IN_PARTS
    | TRAINED_UNDER_DDP
    | TRAINED_UNDER_FSDP2
    | AVERAGED
    | MERGED
    | EVALUATED
)
# What one process does otherwise: it is not sharded, and pads the rows of a window in one batch.
OF_ENGINES = ("fsdp_config", "padding_free", "per_device_train_batch_size", "gradient_accumulation_steps")
# Drawn text and an optimizer with moments: both have a state.
SAVING = {"lmbda": 0.5, "top_k": 0, "optim": "adamw_torch", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
RESUMED = {
    "whole": SAVING,
    "resumed": {**SAVING, "resumes": "whole"},
    "whole, lora": {**SAVING, "lora": {}},
    "resumed, lora": {**SAVING, "lora": {}, "resumes": "whole, lora"},
}
# λ of the one follows the loss on its rows, and is part of what a checkpoint holds.
TEACHERS = {
    "teachers": {
        "math": {
            **{"teacher_model_name_or_path": "teacher", "objective": "taid"},
            "assistant_lambda_schedule": {"kind": "taid", "start": 0.2, "rate": 1.0, "momentum": 0.0},
        },
        "chat": {"teacher_model_name_or_path": "tied_student"},
    }
}
RESUMED_TEACHERS = {
    "whole, teachers": {**SAVING, **TEACHERS},
    "resumed, teachers": {**SAVING, **TEACHERS, "resumes": "whole, teachers"},
}
# The teacher is a state.
RESUMED_AVERAGES = {
    f"{run}, average{of}": {
        **{**SAVING, **AVERAGED["moving average"], **settings},
        **({} if run == "whole" else {"resumes": f"whole, average{of}"}),
    }
    for of, settings in {"": {}, " of lora": {"lora": {}}}.items()
    for run in ("whole", "resumed")
}
# The pair has changed places because the student stops too early to answer anything right, and the steps are so long
# that it soon forgets what it got right.
ANSWERING = {
    "student": "teacher",
    "teacher": "student",
    "learning_rate": 3.0,
    "eval_generate": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_rougeL",
}
BEST = {"best answers": ANSWERING, "best answers, lora": {**ANSWERING, "lora": {}}}
REPLAYED = {
    "replayed": {
        "lmbda": 0.5,  # its default, which has no effect
        "sampling": "adaptive",
        "adaptive_threshold": 0.8,
        "replay_capacity": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "max_steps": 8,
        "top_k": 0,
    }
}
# A student whose configuration has a scale that transformers' model does not apply.
MISREAD = {"other logits": {"student": "scaled"}}
# Students that run once their engine has them; of the first one rows are not told apart.
LATE = {name: {"student": name, "padding_free": True, "late": True} for name in ("opt", "gpt2")}
# The student does not survive a word of the fourth row.
SKIPPED = {"row left out": {"student": "broken_student", "nonfinite_loss": "skip"}}
# Blocks of text that differ, so that one process cannot read what two read.
READING = {"text": {"pretrain_dataset": "text", "max_length": 64}}
# A teacher whose engine is not the student's.
SHARDED = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
PLACED = {
    name: {"evaluates_first": True, "teacher_deepspeed": configuration}
    for name, configuration in {
        "teacher whole": {},
        "teacher sharded": {"zero_optimization": SHARDED},
        "teacher offloaded": {"zero_optimization": {**SHARDED, "offload_param": {"device": "cpu"}}},
    }.items()
}


# ---- Running them ----


class Runs(NamedTuple):
    """What each process saw of every case, and where the cases have saved their students."""

    folder: Path
    ranks: dict[str, list[dict]]


One = Callable[[str], tuple[dict, Path]]


def launch(models: Path, folder: Path, engine: str, cases: dict[str, dict]) -> Runs:
    """Two processes run all cases, because starting them takes longest; a hang is an error."""
    arguments = [str(models), str(folder), engine, json.dumps(cases)]
    environment = {**ENVIRONMENT, "XDG_CACHE_HOME": str(models / "cache")}  # where heads of served teachers are kept
    run_ranks("engine_worker", *arguments, environment=environment, processes=2, timeout=500)
    ranks = {name: [json.loads((folder / name / f"rank{rank}.json").read_text()) for rank in (0, 1)] for name in cases}
    return Runs(folder, ranks)


def run_alone(models: Path, folder: Path, case: str) -> dict:
    """One process, each window in a single batch."""
    settings = {name: value for name, value in REFERENCES[case].items() if name not in OF_ENGINES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(models / "cache"))
        return engine_worker.run(models, folder, per_device_train_batch_size=4, **settings)


def run_in_micro_batches(models: Path, folder: Path, settings: dict) -> dict:
    """One process, each row of a window in a batch of its own."""
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    return engine_worker.run(models, folder, **split, **settings)


# ---- What must hold ----


def figures(result: dict) -> dict[str, list[float]]:
    assert "refused" not in result, result["refused"]
    return {name: [entry[name] for entry in result["log"] if name in entry] for name in FIGURES}


def assert_equal_figures(result: dict, other: dict, rel: float = 1e-5) -> None:
    assert figures(result) == {name: pytest.approx(values, rel=rel) for name, values in figures(other).items()}


def assert_equal_weights(folder: Path, other: Path, rtol: float = 1e-5) -> None:
    """Of the students that are saved there, an adapter with its base."""
    weights = [load_causal_lm(str(saved), {}, distributed=False).state_dict() for saved in (folder, other)]
    torch.testing.assert_close(*weights, rtol=rtol, atol=1e-6)


def assert_trains_like_one(two: Runs, one: One, case: str) -> None:
    result, folder = one(case)
    settings = REFERENCES[case]
    steps = settings.get("num_train_epochs", 1) * (4 if settings.get("rows") in (14, 16) else 3)
    assert len(figures(result)["loss"]) == len(figures(result)["grad_norm"]) == steps
    for rank in two.ranks[case]:
        assert_equal_figures(rank, result)
        assert not [epoch for epoch in rank["filled"] if 1 <= epoch < 2], "the teacher runs in the first epoch alone"
    assert_equal_weights(two.folder / case, folder)


def assert_evaluates_like_one(two: Runs, one: One) -> None:
    [case] = EVALUATED
    result, _ = one(case)
    assert figures(result)["eval_kl"]
    for rank in two.ranks[case]:
        assert_equal_figures(rank, result)


def assert_saved_is_what_was_trained(two: Runs, case: str, folder: Path) -> None:
    saved = two.folder / case
    if (saved / "adapter_config.json").exists():
        assert main(["merge", str(saved), str(folder)]) == 0
        saved = folder
    student = load_causal_lm(str(saved), {}, distributed=False)
    for rank in two.ranks[case]:
        got, want = torch.tensor(engine_worker.logits(student)), torch.tensor(rank["logits"])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=5e-5)  # a merged adapter rounds otherwise


def assert_resumed_like_uninterrupted(two: Runs, whole: str, resumed: str) -> None:
    assert saved_under(two.folder / whole / "checkpoint-2") == two.ranks[whole][0]["runs under"]
    for before, after in zip(two.ranks[whole], two.ranks[resumed], strict=True):
        assert len(before["sources"]) == 4 and "student" in before["sources"]
        assert after["completions"] == before["completions"][2:]  # the first two steps are not made again
        assert_equal_figures(after, before, rel=1e-6)
    assert_equal_weights(two.folder / resumed, two.folder / whole, rtol=0)


def assert_best_is_kept(two: Runs, case: str) -> None:
    for rank in two.ranks[case]:
        *during, after = [entry for entry in rank["log"] if "eval_rougeL" in entry]
        best = max(during, key=lambda entry: entry["eval_rougeL"])
        assert best["eval_rougeL"] > during[-1]["eval_rougeL"]
        assert after["eval_rougeL"] == best["eval_rougeL"]
        assert after["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)
    assert_equal_weights(two.folder / case, two.folder / case / f"checkpoint-{best['step']}", rtol=0)


def assert_held(two: Runs, one: One, share: float, cases: dict[str, dict]) -> None:
    """Each process holds that share of both models."""
    for case in cases:
        want = [share * held for held in one(case)[0]["bytes"]]
        alone = "shared base" in case or ("teacher" in case.split() and "another tokenizer" not in case)
        assert len(want) == (3 if case in ("two teachers", "caches of two teachers") else 1 if alone else 2), case
        for rank in two.ranks[case]:
            assert rank["bytes"] == pytest.approx(want, rel=0.02), case


def assert_ranks_stop_at_different_lengths(two: Runs, case: str) -> None:
    first, second = ([max(map(len, window)) for window in rank["completions"]] for rank in two.ranks[case])
    assert len(first) == 3 and first != second


def assert_nothing_trained_changes_nothing(two: Runs) -> None:
    for rank in two.ranks["silent rows"]:
        assert figures(rank)["loss"][1] == figures(rank)["grad_norm"][1] == 0.0
        assert "kl" not in rank["log"][1]


def assert_replays_together(two: Runs) -> None:
    """The same decisions, the same figures, and rows that the process itself has written before."""
    first, second = two.ranks["replayed"]
    assert first["sources"] == second["sources"] and {"student", "replay"} <= set(first["sources"])
    assert_equal_figures(second, first, rel=1e-6)
    for rank in (first, second):
        assert all(map(math.isfinite, figures(rank)["loss"])) and len(figures(rank)["loss"]) == 8
        written: list[list[int]] = []
        for source, completions in zip(rank["sources"], rank["completions"], strict=True):
            if source == "student":
                written += completions
            elif source == "replay":
                assert all(completion in written for completion in completions)


def assert_other_logits_are_refused(two: Runs) -> None:
    for rank in two.ranks["other logits"]:
        assert "MptForCausalLM" in rank["refused"] and "logit_scale=0.5" in rank["refused"]


def assert_left_out_like_one(two: Runs, one: dict) -> None:
    for rank in two.ranks["row left out"]:
        for name in ("loss", "grad_norm", "kl", "nll"):
            assert figures(rank)[name] == pytest.approx(figures(one)[name], rel=1e-5)
            assert all(map(math.isfinite, figures(rank)[name]))
        assert [entry["skipped_batches"] for entry in rank["log"] if "skipped_batches" in entry] == [1.0, 1.0, 2.0]
