"""Training with a teacher that is not in memory: a real HTTP server, and a cache that the command writes."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from observe import logged, same_runs, weights
from server import HANG_UP, serving
from tiny import (
    messages_dataset,
    multi_turn_dataset,
    prompt_completion_dataset,
    save_tiny,
    tiny_llama,
    tiny_tokenizer,
)
from transformers import TrainerCallback

from amid_trl import OBJECTIVES, AMiDConfig, AMiDTrainer, cli
from amid_trl.data.batches import DistillationCollator
from amid_trl.data.datasets import prepare_dataset
from amid_trl.data.rows import DataSettings
from amid_trl.teacher.cache import TeacherCache
from amid_trl.teacher.server import TeacherServer
from amid_trl.training.fill_cache import cache_teacher


CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "optim": "sgd",  # Adam would hide the size of a gradient
    "max_new_tokens": 6,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "eval_strategy": "steps",
    "eval_steps": 3,
}
VOCABULARY = 360


@pytest.fixture
def run(tmp_path, tokenizer):
    """A finished run; with a teacher, or with settings that stand for one."""

    def train(teacher=None, folder="run", callback=None, resume=None, **settings):
        trainer = AMiDTrainer(
            tiny_llama(tokenizer, seed=0),
            teacher,
            AMiDConfig(str(tmp_path / folder), **{**CONFIG, **settings}),
            train_dataset=messages_dataset(8),
            eval_dataset=messages_dataset(3),
            processing_class=tokenizer,
            callbacks=[callback] if callback else None,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


# ---- A server ----


@pytest.mark.parametrize(
    "settings",
    [
        {"lmbda": 0.0},
        {"lmbda": 1.0},
        {"lmbda": 0.0, "objective": "taid", "assistant_lambda_schedule": {"kind": "taid"}},
        {"lmbda": 0.5, "sampling_block_size": 2, "objective": "skl", "student_text_objective": "srkl"},
    ],
    ids=str,
)
def test_a_server_that_gives_the_whole_vocabulary_is_the_teacher_in_memory(run, teacher, settings):
    with serving(teacher, max_logprobs=VOCABULARY) as server:
        served = run(teacher_model_server_url=server.url, teacher_top_k=VOCABULARY, **settings)
    same_runs(served, run(teacher, folder="memory", **settings))
    assert logged(served, "teacher_tail_mass") == [0.0] * 3
    assert logged(served, "eval_teacher_tail_mass") == [0.0]


def test_a_temperature_is_refused_when_the_server_has_said_that_it_gives_lists(run, teacher):
    refused = "temperature must be 1 with a teacher known by its likeliest tokens: .* got 2.0"
    with serving(teacher) as server, pytest.raises(ValueError, match=refused):
        run(teacher_model_server_url=server.url, teacher_top_k=8, distill_temperature=2.0)


def test_what_the_server_leaves_out_is_logged_and_kl_is_a_lower_bound(run, teacher):
    with serving(teacher) as server:
        served = run(
            teacher_model_server_url=server.url, teacher_top_k=8, lmbda=0.0, objective="kd", learning_rate=0.0
        )
    memory = run(teacher, folder="memory", lmbda=0.0, objective="kd", learning_rate=0.0)
    assert all(0 < mass < 1 for mass in logged(served, "teacher_tail_mass"))
    for bound, kl in zip(logged(served, "kl"), logged(memory, "kl"), strict=True):
        assert 0 < bound < kl
    assert "teacher_tail_mass" not in memory.state.log_history[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_trains_with_a_sparse_teacher(run, teacher, objective):
    with serving(teacher) as server:
        trainer = run(teacher_model_server_url=server.url, teacher_top_k=5, objective=objective, eval_strategy="no")
    assert all(torch.isfinite(weight).all() for weight in weights(trainer.model).values())
    assert len(logged(trainer, "loss")) == 3


class Dying(TrainerCallback):
    """After the second step the server hangs up, whatever it is asked."""

    def __init__(self, server):
        self.server = server

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.server.faults += [HANG_UP] * 100


def test_a_server_that_dies_ends_the_run_and_leaves_a_checkpoint_to_resume_from(run, tmp_path, teacher, monkeypatch):
    monkeypatch.setattr("amid_trl.teacher.server.TeacherServer", partial(TeacherServer, backoff=0.01))
    settings = {"save_strategy": "steps", "save_steps": 1, "teacher_top_k": 8, "eval_strategy": "no", "max_steps": 4}
    settings["teacher_server_patience"] = 1.0
    with serving(teacher) as server:
        settings["teacher_model_server_url"] = server.url
        whole = run(folder="whole", **settings)
        with pytest.raises(ConnectionError, match=r"attempts, .*checkpoint is intact"):
            run(folder="broken", callback=Dying(server), **settings)
        server.faults.clear()
        resumed = run(folder="broken", resume=True, **settings)
    assert resumed.state.global_step == 4 and logged(resumed, "loss") == logged(whole, "loss")
    want = weights(whole.model)
    assert all(torch.equal(mine, want[name]) for name, mine in weights(resumed.model).items())


def test_a_server_with_too_small_a_limit_is_refused_before_the_first_step(run, teacher):
    with serving(teacher, max_logprobs=5) as server, pytest.raises(ValueError, match="greater than max allowed: 5"):
        run(teacher_model_server_url=server.url, teacher_top_k=6)


# ---- A cache ----


@pytest.fixture
def cache(tmp_path, tokenizer, teacher):
    """Writes what the teacher expects for so many of the rows; the folder."""

    def write(rows=8, top_k=VOCABULARY, folder="cache", teacher=teacher, **settings):
        config = AMiDConfig(str(tmp_path / "caching"), **{**CONFIG, "lmbda": 0.0})
        data = {"train_dataset": messages_dataset(rows), "eval_dataset": messages_dataset(3)}
        trainer = AMiDTrainer(tiny_llama(tokenizer), teacher, config, processing_class=tokenizer, **data)
        cache_teacher(trainer, str(tmp_path / folder), top_k, **settings)
        return str(tmp_path / folder)

    return write


# float16 has 11 bits: log-probabilities about 10 are 0.004 apart.
@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-5), ("float16", 0.01)])
def test_a_cache_of_the_whole_vocabulary_is_the_teacher_in_memory_but_for_its_rounding(
    run, cache, teacher, dtype, rel
):
    cached = run(teacher_cache=cache(dtype=dtype), teacher_top_k=1000, lmbda=0.0)  # more than there are
    same_runs(cached, run(teacher, folder="memory", lmbda=0.0), rel=rel)
    assert logged(cached, "teacher_tail_mass") == [0.0] * 3


@pytest.mark.parametrize("top_k", [8, VOCABULARY])
def test_a_cache_that_a_server_has_filled_trains_as_the_server(run, tmp_path, tokenizer, teacher, top_k):
    settings = {"lmbda": 0.0, "teacher_top_k": top_k}
    folder = str(tmp_path / "cache")
    data = {"train_dataset": messages_dataset(8), "eval_dataset": messages_dataset(3)}
    with serving(teacher, max_logprobs=VOCABULARY) as server:
        settings["teacher_model_server_url"] = server.url
        served = run(folder="served", **settings)
        config = AMiDConfig(str(tmp_path / "caching"), **CONFIG, **settings)
        trainer = AMiDTrainer(tiny_llama(tokenizer), args=config, processing_class=tokenizer, **data)
        cache_teacher(trainer, folder, top_k, "float32")
        asked = len(server.questions)
        cache_teacher(trainer, folder, top_k, "float32")
        assert len(server.questions) == asked, "all rows are there"
    del settings["teacher_model_server_url"]
    cached = run(folder="cached", teacher_cache=folder, **settings)
    same_runs(cached, served)
    assert logged(cached, "teacher_tail_mass") == pytest.approx(logged(served, "teacher_tail_mass"), rel=1e-5)
    assert json.loads(Path(folder, "teacher.json").read_text())["teacher"] == "tiny", "the name that it lists"
    with pytest.raises(ValueError, match="written with teacher 'tiny', not 'another'"):
        run(teacher_cache=folder, teacher_model_name_or_path="another", **settings)


def test_padding_of_the_teachers_vocabulary_is_not_cached(run, cache, tokenizer):
    padded = tiny_llama(tokenizer, seed=1, vocab_size=368)
    cached = run(teacher_cache=cache(teacher=padded, dtype="float32"), teacher_top_k=VOCABULARY, lmbda=0.0)
    same_runs(cached, run(padded, folder="memory", lmbda=0.0))


def pads_on_the_left(rows, end):
    batch = DistillationCollator(0)(rows)
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        shift = len(mask) - int(mask.sum())
        for column in (ids, labels, mask):
            column.copy_(column.roll(shift))
    return batch


def hides_ends(rows, end):
    """Padding is EOS, and all of it is hidden: the last one of a row too, which is trained."""
    batch = DistillationCollator(end)(rows)
    return {**batch, "attention_mask": (batch["input_ids"] != end).long()}


@pytest.mark.parametrize(
    ("collate", "dataset"), [(pads_on_the_left, messages_dataset), (hides_ends, prompt_completion_dataset)]
)
def test_rows_of_a_collator_of_ones_own_are_found(tmp_path, tokenizer, teacher, collate, dataset):
    settings = {name: value for name, value in CONFIG.items() if not name.startswith("eval")}
    prepared = prepare_dataset(dataset(8), tokenizer, DataSettings(), name="train")

    def run(teacher_model, folder, **more):
        trainer = AMiDTrainer(
            tiny_llama(tokenizer),
            teacher_model,
            AMiDConfig(str(tmp_path / folder), **{**settings, **more, "lmbda": 0.0}),
            data_collator=partial(collate, end=tokenizer.eos_token_id),
            train_dataset=prepared,
            processing_class=tokenizer,
        )
        trainer.train()
        return logged(trainer, "loss")

    with serving(teacher, max_logprobs=VOCABULARY) as server:
        served = run(None, "served", teacher_model_server_url=server.url, teacher_top_k=VOCABULARY)
    assert served == pytest.approx(run(teacher, "memory"), rel=1e-5)


def test_only_rows_that_are_missing_are_written(cache):
    shards = []
    for rows in (5, 8, 8):
        folder = Path(cache(rows=rows))
        assert len(TeacherCache(folder)) == rows
        shards.append(sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("shard*")))
    assert [len(names) for names in shards] == [1, 2, 2]
    assert shards[0] == shards[1][:1] and shards[1] == shards[2]


def test_a_cache_that_does_not_fit_is_refused_before_the_first_step(run, cache, tokenizer):
    folder = cache(rows=5, top_k=8)
    settings = {"teacher_cache": folder, "lmbda": 0.0}
    with pytest.raises(
        ValueError, match="3 of 8 rows of the train dataset are not in the teacher's cache, row 5 first"
    ):
        run(teacher_top_k=8, **settings)
    with pytest.raises(ValueError, match="written with top_k 8, not 100"):
        run(**settings)
    with pytest.raises(ValueError, match=r"written with teacher .*, not 'another'"):
        run(teacher_top_k=8, teacher_model_name_or_path="another", **settings)
    name = json.loads(Path(folder, "teacher.json").read_text())["teacher"]
    with pytest.raises(ValueError, match="written with revision None, not 'v2'"):
        run(teacher_top_k=8, teacher_model_name_or_path=name, teacher_model_revision="v2", **settings)
    model = tiny_llama(tokenizer, vocab_size=380)
    with pytest.raises(ValueError, match="written with tokenizer"):
        AMiDTrainer(
            model,
            args=AMiDConfig("unused", **{**CONFIG, **settings, "teacher_top_k": 8}),
            train_dataset=messages_dataset(5),
            eval_dataset=messages_dataset(3),
            processing_class=tiny_tokenizer(vocab_size=370),
        )


def test_a_cache_without_the_evaluation_sets_rows_is_refused(tmp_path, tokenizer, cache):
    with pytest.raises(ValueError, match="4 of 4 rows of the eval dataset are not in the teacher's cache"):
        AMiDTrainer(
            tiny_llama(tokenizer),
            args=AMiDConfig(
                str(tmp_path), **{**CONFIG, "teacher_cache": cache(), "lmbda": 0.0, "teacher_top_k": 1000}
            ),
            train_dataset=messages_dataset(8),
            eval_dataset=multi_turn_dataset(4),
            processing_class=tokenizer,
        )


def test_the_command_writes_what_train_reads(tmp_path, tokenizer, teacher, monkeypatch, capsys):
    save_tiny(tmp_path / "student", tiny_llama(tokenizer), tokenizer)
    save_tiny(tmp_path / "teacher", teacher, tokenizer)
    messages_dataset(6).to_json(tmp_path / "data" / "train.jsonl")
    settings = {
        **{name: value for name, value in CONFIG.items() if not name.startswith("eval")},
        "output_dir": str(tmp_path / "out"),
        "model_name_or_path": str(tmp_path / "student"),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "dataset_name": str(tmp_path / "data"),
        "teacher_cache": str(tmp_path / "cache"),
        "teacher_top_k": 12,
        "teacher_cache_dtype": "float32",
        "lmbda": 0.0,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
    config = ["--config", str(tmp_path / "run.yaml"), "--num_processes", "1"]
    command = [sys.executable, "-m", "amid_trl", "cache-teacher", *config]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{tmp_path / 'cache'}: 6 rows" in done.stdout
    assert json.loads((tmp_path / "cache" / "teacher.json").read_text())["dtype"] == "float32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as a launcher would
    assert cli.main(["train", *config[:2]]) == 0
    assert "teacher_tail_mass" in capsys.readouterr().out


# ---- Refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_top_k": 5}, "teacher_top_k has no effect on a teacher in memory"),
        ({"teacher_cache_dtype": "float32"}, "teacher_cache_dtype has no effect without a teacher_cache"),
        ({"teacher_cache_fill": True}, "teacher_cache_fill has no effect without a teacher_cache"),
        ({"teacher_cache_states": True}, "teacher_cache_states has no effect without a teacher_cache"),
        ({"teacher_cache": "x", "lmbda": 0.0, "teacher_cache_dtype": "bfloat16"}, "'float16' or 'float32'; got 'bf"),
        (
            {"teacher_cache": "x", "lmbda": 0.0, "teacher_cache_states": True, "teacher_cache_dtype": "int8"},
            "'bfloat16', 'float16' or 'float32'; got 'int8'",
        ),
        (
            {"teacher_cache": "x", "lmbda": 0.0, "teacher_cache_fill": True, "teacher_top_k": 5},
            "teacher_top_k has no effect on a cache of hidden states",
        ),
        ({"teacher_cache": "x", "teacher_cache_fill": True}, "dataset's text alone; set lmbda=0.0"),
        ({"teacher_cache": "x", "lmbda": 0.0, "teacher_cache_dtype": "int8"}, "'float16' or 'float32'; got 'int8'"),
        ({"teacher_cache": "x", "teacher_top_k": 0}, "teacher_top_k must be at least 1; got 0"),
        ({"teacher_cache": "x"}, "teacher_cache holds .* dataset's text alone; set lmbda=0.0"),
        ({"teacher_cache": "x", "lmbda": 0.0, "seq_kd": True}, "seq_kd=True needs a teacher in memory"),
        ({"teacher_model_server_url": "http://x", "teacher_cache": "y"}, "teacher_cache holds .* set lmbda=0.0"),
        (
            {"teacher_model_server_url": "http://x", "teacher_cache_dtype": "float32"},
            "teacher_cache_dtype has no effect without a teacher_cache",
        ),
        (
            {"teacher_model_server_url": "http://x", "teacher_model_name_or_path": "y"},
            "teacher_model_name_or_path has no effect beside teacher_model_server_url",
        ),
        (
            {"teacher_cache": "x", "lmbda": 0.0, "teacher_model_revision": "v2", "teacher_offload": True},
            "teacher_model_revision, teacher_offload has no effect on a teacher_cache that is read, without",
        ),
    ],
)
def test_what_an_absent_teacher_cannot_do_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AMiDConfig(output_dir="unused", use_cpu=True, **settings)


def test_a_temperature_is_refused_where_only_the_likeliest_tokens_are_known(run, cache):
    folder = cache(top_k=8)
    with pytest.raises(ValueError, match="temperature must be 1 with a teacher known by its likeliest tokens"):
        run(teacher_cache=folder, teacher_top_k=8, lmbda=0.0, distill_temperature=2.0)


def test_a_teacher_is_given_once(run, teacher):
    with pytest.raises(ValueError, match="the teacher is given twice: as teacher_model and as http://somewhere"):
        run(teacher, teacher_model_server_url="http://somewhere")


def test_a_folder_that_is_no_cache_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="holds no teacher's answers"):
        run(teacher_cache=str(tmp_path), lmbda=0.0)


def test_a_cache_is_not_written_by_an_adapter_of_the_students_base(capsys):
    given = ["--model_name_or_path", "student", "--dataset_name", "data", "--lmbda", "0"]
    assert cli.main(["cache-teacher", *given, "--teacher_adapter_path", "x", "--teacher_cache", "y"]) == 2
    assert "teacher_cache has no effect beside teacher_adapter_path" in capsys.readouterr().err


def test_training_is_not_given_a_server_and_a_cache(run, tmp_path):
    both = {"teacher_model_server_url": "http://somewhere", "teacher_cache": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=r"teacher_cache has no effect beside .* leaves teacher_model_server_url out"):
        run(lmbda=0.0, **both)
