"""A cache of hidden states is the teacher in memory, for every objective, and is filled while it is used."""

import json
from pathlib import Path

import pytest
import torch
from families import family_model
from observe import logged, weights
from safetensors.torch import load_file, save_file
from small_tokenizers import special_first
from tiny import messages_dataset, save_tiny, tiny_llama
from transformers import TrainerCallback

from amid_trl import OBJECTIVES, AMiDConfig, AMiDTrainer, cli
from amid_trl.maths.kernel import Finish
from amid_trl.maths.linear import Head
from amid_trl.teacher.cache import TeacherCache
from amid_trl.teacher.filling import FillingTeacher
from amid_trl.teacher.head_files import head_hash, packed_head
from amid_trl.teacher.in_memory import ModelTeacher
from amid_trl.training.fill_cache import cache_teacher


CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "optim": "sgd",  # Adam would hide the size of a gradient
    "lmbda": 0.0,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "eval_strategy": "epoch",
}
ROWS, EVALUATED = 7, 3  # the rows of the evaluation set are the first of the training set


@pytest.fixture
def build(tmp_path, tokenizer):
    """A trainer of a fresh student; its teacher may be a name, a model or nothing."""

    def new(teacher=None, folder="run", callback=None, **settings):
        return AMiDTrainer(
            tiny_llama(tokenizer, seed=0),
            teacher,
            AMiDConfig(str(tmp_path / folder), **{**CONFIG, **settings}),
            train_dataset=messages_dataset(ROWS),
            eval_dataset=messages_dataset(EVALUATED),
            processing_class=tokenizer,
            callbacks=[callback] if callback else None,
        )

    return new


@pytest.fixture
def run(build):
    """A finished run."""

    def train(*args, resume=None, **settings):
        trainer = build(*args, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


@pytest.fixture
def passes(monkeypatch):
    """Counts the rows that a teacher in memory is asked about."""
    rows = []
    ask = ModelTeacher.__call__

    def counted(self, batch):
        if not torch.equal(batch["input_ids"], batch["labels"]):  # not the tokens by which weights are compared
            rows.append(len(batch["input_ids"]))
        return ask(self, batch)

    monkeypatch.setattr(ModelTeacher, "__call__", counted)
    return rows


def same_runs(trainer, reference, rel=1e-6):
    for name in ("loss", "grad_norm", "kl", "teacher_entropy", "top1_agreement", "nll", "eval_loss", "eval_kl"):
        assert logged(trainer, name) == pytest.approx(logged(reference, name), rel=rel), name
    want = weights(reference.model)
    for name, mine in weights(trainer.model).items():
        torch.testing.assert_close(mine, want[name], rtol=rel, atol=1e-6)


# ---- Written by the command, read by training ----


@pytest.fixture
def written(build, tmp_path):
    """Has `cache_teacher` write the hidden states of a teacher; the folder."""

    def write(teacher, folder="cache", **settings):
        trainer = build(teacher, folder="caching")
        trainer.args.teacher_cache_states = True
        for name, value in settings.items():
            setattr(trainer.args, name, value)
        cache_teacher(trainer, str(tmp_path / folder), 100)
        return str(tmp_path / folder)

    return write


@pytest.mark.sampled(2)
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_is_that_of_the_teacher_in_memory(run, written, teacher, objective):
    settings = {"objective": objective, "num_train_epochs": 1}
    cached = run(teacher_cache=written(teacher), **settings)
    same_runs(cached, run(teacher, folder="memory", **settings))
    assert cached.teacher_model is None and "teacher_tail_mass" not in cached.state.log_history[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"distill_temperature": 2.0, "assistant_alpha": 3.0},
        {"objective": "taid", "assistant_lambda_schedule": {"kind": "taid"}, "sft_weight": 0.5},
    ],
    ids=str,
)
def test_temperatures_and_what_moves_are_those_of_the_teacher_in_memory(run, written, teacher, settings):
    same_runs(run(teacher_cache=written(teacher), **settings), run(teacher, folder="memory", **settings))


def test_a_head_with_a_soft_cap_and_a_padded_vocabulary_is_kept(build, run, written, tokenizer):
    teacher = family_model("gemma2", tokenizer, final_logit_softcapping=3.0, vocab_size=368)
    cached = run(teacher_cache=written(teacher))
    same_runs(cached, run(teacher, folder="memory"))
    about = json.loads(Path(cached.args.teacher_cache, "teacher.json").read_text())
    assert about["softcap"] == 3.0 and about["vocabulary"] < 368


# bfloat16 has 8 bits, float16 has 11: the hidden states are about 1.
@pytest.mark.parametrize(("dtype", "rel"), [("bfloat16", 0.05), ("float16", 0.005)])
def test_half_precision_is_the_teacher_but_for_its_rounding(run, written, teacher, dtype, rel):
    folder = written(teacher, teacher_cache_dtype=dtype)
    cached, memory = run(teacher_cache=folder), run(teacher, folder="memory")
    assert logged(cached, "kl") == pytest.approx(logged(memory, "kl"), rel=rel)
    assert logged(cached, "kl") != logged(memory, "kl")


def test_what_is_kept_is_the_hidden_state_of_every_trained_token(build, written, teacher):
    folder = Path(written(teacher))
    trainer = build(teacher)
    trained = sum(label != -100 for row in trainer.train_dataset for label in row["labels"][1:])
    [shard] = folder.glob("shard-*")
    hidden = load_file(shard)["hidden"]
    dim = teacher.config.hidden_size
    assert hidden.shape == (trained, dim) and hidden.dtype == torch.float32
    head = folder / f"{TeacherCache(folder).about['head']}.safetensors"
    assert torch.equal(load_file(head)["weight"], teacher.lm_head.weight[: trainer.vocabulary])
    modes = {file.stat().st_mode for file in folder.iterdir() if file.suffix in (".json", ".safetensors")}
    assert len(modes) == 1, "others may read all of it, or none"


def test_the_hash_of_a_head_is_that_of_its_numbers():
    weight = torch.randn(5, 4)
    heads = [Head(weight), Head(weight + 1e-6), Head(weight.double()), Head(weight, torch.zeros(5))]
    hashes = [head_hash(packed_head(head)) for head in (*heads, Head(weight.view(10, 2)))]
    assert len({*hashes}) == 5 and head_hash(packed_head(Head(weight.clone(), finish=Finish(2.0)))) == hashes[0]


# ---- Filled while training ----


def test_from_the_second_epoch_on_the_teacher_does_not_run(run, passes, tmp_path, teacher):
    filled = run(teacher, teacher_cache=str(tmp_path / "cache"), teacher_cache_fill=True, num_train_epochs=3)
    assert sum(passes) == ROWS
    same_runs(filled, run(teacher, folder="memory", num_train_epochs=3))
    assert len(TeacherCache(tmp_path / "cache")) == ROWS


def test_a_cache_that_is_whole_loads_no_teacher(run, passes, tmp_path, teacher, tokenizer):
    save_tiny(tmp_path / "teacher", teacher, tokenizer)
    settings = {
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "teacher_cache": str(tmp_path / "cache"),
        "teacher_cache_fill": True,
    }
    first = run(folder="first", **settings)
    assert isinstance(first.teacher, FillingTeacher) and sum(passes) == ROWS
    second = run(folder="second", **settings)
    assert second.teacher_model is None and sum(passes) == ROWS
    same_runs(second, first)


def test_a_cache_that_lacks_a_row_loads_the_teacher_and_asks_for_that_alone(
    build, passes, tmp_path, teacher, tokenizer
):
    save_tiny(tmp_path / "teacher", teacher, tokenizer)
    settings = {
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "teacher_cache": str(tmp_path / "cache"),
        "teacher_cache_fill": True,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
    }
    build(folder="first", **settings).evaluate()
    assert sum(passes) == EVALUATED
    second = build(folder="second", **settings)
    assert second.teacher_model is not None
    second.train()
    assert sum(passes) == ROWS


def test_a_run_that_is_resumed_sees_what_it_has_kept(run, tmp_path, teacher):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    settings = {
        "teacher_cache_fill": True,
        "teacher_cache_dtype": "bfloat16",
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "no",
    }
    whole = run(teacher, teacher_cache=str(tmp_path / "a"), folder="whole", **settings)
    run(teacher, teacher_cache=str(tmp_path / "b"), folder="broken", callback=Stop(), **settings)
    resumed = run(teacher, teacher_cache=str(tmp_path / "b"), folder="broken", resume=True, **settings)
    assert logged(resumed, "loss") == logged(whole, "loss")
    want = weights(whole.model)
    assert all(torch.equal(mine, want[name]) for name, mine in weights(resumed.model).items())


def test_an_adapter_of_the_students_base_is_kept_too(tmp_path, tokenizer, passes):
    from peft import LoraConfig

    def train(folder, **settings):
        trainer = AMiDTrainer(
            tiny_llama(tokenizer, seed=0),
            args=AMiDConfig(str(tmp_path / folder), **CONFIG, teacher_adapter_path="base", **settings),
            train_dataset=messages_dataset(ROWS),
            eval_dataset=messages_dataset(EVALUATED),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
        )
        trainer.train()
        return trainer

    filled = train("filled", teacher_cache=str(tmp_path / "cache"), teacher_cache_fill=True)
    same_runs(filled, train("memory"))
    assert len(TeacherCache(tmp_path / "cache")) == ROWS


@pytest.fixture
def command(tmp_path, tokenizer, teacher, monkeypatch):
    """Runs `amid-trl` with settings in a file, as a launcher would; the exit status."""
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
    }
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")

    def run(name, **more):
        (tmp_path / "run.yaml").write_text(json.dumps({**settings, **more}))  # JSON is YAML
        return cli.main([name, "--config", str(tmp_path / "run.yaml")])

    return run


def test_the_command_writes_hidden_states_if_asked_to(command, tmp_path, capsys):
    settings = {"teacher_cache_states": True, "teacher_cache_dtype": "bfloat16"}
    assert command("cache-teacher", **settings) == 0
    assert f"{tmp_path / 'cache'}: 6 rows" in capsys.readouterr().out
    [shard] = (tmp_path / "cache").glob("shard-*")
    assert load_file(shard)["hidden"].dtype == torch.bfloat16
    assert command("train", **settings) == 0
    assert "teacher_tail_mass" not in capsys.readouterr().out


def test_the_command_writes_what_a_filling_run_would(command, tmp_path):
    assert command("cache-teacher", teacher_cache_fill=True) == 0
    shards = sorted((tmp_path / "cache").glob("shard-*"))
    assert command("train", teacher_cache_fill=True) == 0
    assert sorted((tmp_path / "cache").glob("shard-*")) == shards


# ---- Refused ----


@pytest.mark.parametrize("holds_states", [False, True], ids=["lists", "states"])
def test_the_command_refuses_a_teacher_with_another_tokenizer(command, tmp_path, capsys, holds_states):
    """By the names of both, before there is a folder."""
    student, teacher, cache = (str(tmp_path / name) for name in ("student", "other", "cache"))
    save_tiny(tmp_path / "other", tiny_llama(special_first(), seed=1), special_first())
    asked = {"teacher_model_name_or_path": teacher, "teacher_cache_states": holds_states}
    assert command("cache-teacher", **asked) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    needs = f"teacher_cache={cache!r} needs a teacher with the student's tokenizer: the student's is {student}"
    assert said == f"amid-trl cache-teacher: {needs}, and the teacher reads in its own, {teacher}"
    assert not (tmp_path / "cache").exists()


def test_another_head_or_dtype_is_refused(build, run, tmp_path, teacher, tokenizer):
    settings = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_fill": True}
    run(teacher, **settings)
    with pytest.raises(ValueError, match="written with dtype 'float32', not 'bfloat16'"):
        build(teacher, **settings, teacher_cache_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"written with head '[0-9a-f]{64}', not '"):
        build(tiny_llama(tokenizer, seed=5), **settings)


def other_weights(teacher, tokenizer):
    """Another teacher with the same head, as an adapter or further training below it makes one."""
    other = tiny_llama(tokenizer, seed=5, hidden_size=teacher.config.hidden_size)
    other.lm_head.load_state_dict(teacher.lm_head.state_dict())
    return other


def test_other_weights_below_the_same_head_are_refused_in_the_first_step(run, tmp_path, teacher, tokenizer):
    settings = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_fill": True}
    run(teacher, **settings)
    with pytest.raises(ValueError, match=r"filled by a teacher with other weights than .*: its hidden states"):
        run(other_weights(teacher, tokenizer), **settings)


def test_a_name_under_which_other_weights_lie_now_is_no_whole_cache(run, tmp_path, teacher, tokenizer):
    save_tiny(tmp_path / "teacher", teacher, tokenizer)
    settings = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_fill": True}
    settings["teacher_model_name_or_path"] = str(tmp_path / "teacher")
    run(**settings)
    save_tiny(tmp_path / "teacher", other_weights(teacher, tokenizer), tokenizer)
    with pytest.raises(ValueError, match="filled by a teacher with other weights"):
        run(**settings)
    with pytest.raises(ValueError, match="written with dtype 'float32', not 'bfloat16'"):
        run(bf16=True, **settings)


def test_a_cache_that_was_written_with_fewer_positions_bounds_the_rows_that_are_read(build, tokenizer, tmp_path):
    short = tiny_llama(tokenizer, seed=1, hidden_size=48, max_position_embeddings=20)
    caching = build(short, folder="caching")
    caching.args.teacher_cache_states = True
    cache_teacher(caching, str(tmp_path / "cache"), 100)
    assert build(teacher_cache=str(tmp_path / "cache"))._positions == 20


def test_lists_are_not_filled_with_states_nor_states_with_lists(build, written, tmp_path, teacher):
    trainer = build(teacher)
    cache_teacher(trainer, str(tmp_path / "lists"), 8)
    with pytest.raises(ValueError, match="holds the 8 likeliest tokens of each position; name another folder"):
        build(teacher, teacher_cache=str(tmp_path / "lists"), teacher_cache_fill=True)
    with pytest.raises(ValueError, match=r"teacher_cache_states=True, but the cache .* holds the 8 likeliest"):
        build(teacher_cache=str(tmp_path / "lists"), teacher_cache_states=True)
    with pytest.raises(ValueError, match=r"written with .*format 2, not 1"):
        cache_teacher(trainer, written(teacher), 8)
    with pytest.raises(ValueError, match=r"teacher_top_k has no effect: the cache .* holds hidden states"):
        build(teacher_cache=str(tmp_path / "cache"), teacher_top_k=7)


def test_a_head_that_is_lost_or_damaged_is_named(build, written, teacher):
    folder = Path(written(teacher))
    file = folder / f"{TeacherCache(folder).about['head']}.safetensors"
    save_file({"weight": load_file(file)["weight"] + 1.0}, file)
    with pytest.raises(ValueError, match=r"written with head '?[0-9a-f]{64}'?, not"):
        build(teacher_cache=str(folder))
    file.unlink()
    with pytest.raises(ValueError, match=f"has lost {file.name}"):
        build(teacher_cache=str(folder))
