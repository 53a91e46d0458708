"""A cache whose files are damaged, lost or another cache's is refused before the first step, and the file is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import messages_dataset, save_tiny, tiny_llama, tiny_tokenizer

from amid_trl import AMiDConfig, AMiDTrainer, cli
from amid_trl.teacher.cache import CachedTeacher, CacheWriter, TeacherCache
from amid_trl.teacher.cache_about import CacheAbout
from amid_trl.teacher.filling import FillingTeacher
from amid_trl.training.fill_cache import cache_teacher


CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "lmbda": 0.0,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}
ROWS, TOP_K = 6, 8


def build(folder, rows=ROWS, **settings):
    """A trainer of a fresh student."""
    tokenizer = tiny_tokenizer()
    return AMiDTrainer(
        tiny_llama(tokenizer, seed=0),
        args=AMiDConfig(str(folder / "run"), **{**CONFIG, **settings}),
        train_dataset=messages_dataset(rows),
        processing_class=tokenizer,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of a teacher and of what it has answered: lists and hidden states, in two dtypes each. Read only."""
    folder, tokenizer = tmp_path_factory.mktemp("written"), tiny_tokenizer()
    place = save_tiny(folder / "teacher", tiny_llama(tokenizer, seed=1, hidden_size=48), tokenizer)
    trainer = build(folder, teacher_model_name_or_path=str(place))
    for dtype in ("float16", "float32"):
        cache_teacher(trainer, str(folder / f"lists-{dtype}"), TOP_K, dtype)
    trainer.args.teacher_cache_states = True
    for dtype in ("bfloat16", "float32"):
        trainer.args.teacher_cache_dtype = dtype
        cache_teacher(trainer, str(folder / f"states-{dtype}"), TOP_K)
    return folder


@pytest.fixture
def cache(written, tmp_path):
    """A copy of one of the caches; `fill` is what a run that fills it is given, `read` one that reads it."""

    class Cache:
        def __init__(self, name):
            self.folder = tmp_path / name
            shutil.copytree(written / name, self.folder)
            self.read = {"teacher_cache": str(self.folder)}
            self.read |= {"teacher_top_k": TOP_K} if name.startswith("lists") else {}
            self.fill = {**self.read, "teacher_cache_fill": True, "teacher_model_name_or_path": str(self.teacher)}

        teacher = written / "teacher"

        @property
        def shard(self):
            [file] = self.folder.glob("shard-*")
            return file

        @property
        def head(self):
            return self.folder / f"{TeacherCache(self.folder).about['head']}.safetensors"

        @property
        def probe(self):
            return self.folder / "probe.safetensors"

        @property
        def about(self):
            return self.folder / "teacher.json"

        def say(self, **changed):
            said = {**json.loads(self.about.read_text()), **changed}
            self.about.write_text(json.dumps({name: value for name, value in said.items() if value is not ...}))

    return Cache


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


def change(file, **tensors):
    found = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, file)


# ---- The dtype ----


@pytest.mark.parametrize(
    ("name", "dtype", "settings"),
    [
        ("lists-float16", "float32", {}),
        ("lists-float32", "float16", {}),
        ("states-float32", "float16", {}),
        ("states-bfloat16", "float32", {"teacher_cache_states": True}),
    ],
)
def test_a_dtype_that_is_named_is_the_caches(cache, tmp_path, name, dtype, settings):
    of = cache(name)
    kept = name.partition("-")[2]
    with pytest.raises(ValueError, match=f"written with dtype '{kept}', not '{dtype}'"):
        build(tmp_path, teacher_cache_dtype=dtype, **of.read, **settings)
    build(tmp_path, **of.read, **settings)
    if name != "states-float32":
        build(tmp_path, teacher_cache_dtype=kept, **of.read, **settings)


@pytest.mark.parametrize("rows", [ROWS, ROWS + 1])
def test_a_cache_that_is_filled_has_the_dtype_of_the_run_whether_it_is_whole_or_not(cache, tmp_path, rows):
    of = cache("states-bfloat16")
    with pytest.raises(ValueError, match="written with dtype 'bfloat16', not 'float32'"):
        build(tmp_path, rows, **of.fill)
    kind = CachedTeacher if rows == ROWS else FillingTeacher
    assert isinstance(build(tmp_path, rows, **of.fill, teacher_cache_dtype="bfloat16").teacher, kind)
    of = cache("states-float32")
    assert isinstance(build(tmp_path, rows, **of.fill).teacher, kind)
    assert isinstance(build(tmp_path, rows, **of.fill, teacher_cache_dtype="float32").teacher, kind)


def test_a_dtype_of_hidden_states_alone_says_what_is_missing(cache, tmp_path):
    of = cache("states-bfloat16")
    with pytest.raises(ValueError, match=r"states-bfloat16 holds hidden states: .* needs teacher_cache_states=True"):
        build(tmp_path, teacher_cache_dtype="bfloat16", **of.read)
    lists = cache("lists-float16")
    with pytest.raises(ValueError, match="teacher_cache_dtype must be 'float16' or 'float32'; got 'bfloat16'"):
        build(tmp_path, teacher_cache_dtype="bfloat16", **lists.read)


# ---- Shards ----

SHARDS = {
    "cut": cut,
    "empty": lambda file: file.write_bytes(b""),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "without keys": lambda file: change(file, keys=None),
    "fewer keys": lambda file: change(file, keys=load_file(file)["keys"][1:]),
    "other ends": lambda file: change(file, ends=load_file(file)["ends"] + 1),
    "ends that go back": lambda file: change(file, ends=load_file(file)["ends"].flip(0)),
}


@pytest.mark.parametrize("damage", SHARDS)
def test_a_damaged_shard_is_named_wherever_it_is_opened(cache, tmp_path, damage):
    of = cache("states-float32")
    shard = of.shard
    SHARDS[damage](shard)
    words = rf"{shard} is damaged \(.*\): delete it, and its rows are missing and written again where"
    for settings in (of.read, of.fill):
        with pytest.raises(ValueError, match=words):
            build(tmp_path, **settings)


def test_the_way_out_that_it_names_is_one(cache, tmp_path):
    of = cache("states-float32")
    cut(of.shard)
    of.shard.unlink()
    with pytest.raises(ValueError, match=f"{ROWS} of {ROWS} rows of the train dataset are not in the teacher's cache"):
        build(tmp_path, **of.read)
    build(tmp_path, **of.fill, num_train_epochs=1, max_steps=-1).train()
    assert len(TeacherCache(of.folder)) == ROWS


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("states-float32", {"format": 1, "top_k": TOP_K}),
        ("states-float32", {"dtype": "bfloat16"}),
        ("lists-float16", {"dtype": "float32"}),
    ],
)
def test_shards_of_another_kind_than_the_cache_says_are_refused(cache, tmp_path, name, said):
    of = cache(name)
    of.say(**said)
    with pytest.raises(ValueError, match=rf"{of.shard} holds .*, and a shard of this cache .*put back the file"):
        build(tmp_path, **of.read)


# ---- What all rows have in common ----


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[]", r"it should be a dict, not \[\]"),
        ("{}", r"with format None, not one of \[1, 2\]"),
        ('{"format": [2]}', r"with format \[2\], not one of"),
    ],
)
def test_a_damaged_teacher_json_is_named(cache, tmp_path, said, words):
    of = cache("states-float32")
    of.about.write_text(said)
    for settings in (of.read, of.fill):
        with pytest.raises(ValueError, match=rf"{of.about} cannot be read \(.*{words}.*put back the file"):
            build(tmp_path, **settings)


@pytest.mark.parametrize("name", ["states-float32", "lists-float16"])
def test_what_it_should_say_is_there_and_of_its_type(cache, name):
    of = cache(name)
    said = of.about.read_text()
    for field in json.loads(said):
        for value in (..., {}):
            of.say(**{field: value})
            with pytest.raises(ValueError, match=rf"{of.about} cannot be read \(.*{field}"):
                TeacherCache(of.folder)
            of.about.write_text(said)


def test_rows_whose_teacher_json_is_lost_are_nobodys(cache, tmp_path):
    of = cache("states-float32")
    of.about.unlink()
    with pytest.raises(ValueError, match=r"has rows and has lost teacher\.json, which says of which teacher they are"):
        build(tmp_path, **of.fill)
    assert not of.about.exists()
    lists = cache("lists-float16")
    lists.about.unlink()
    with pytest.raises(ValueError, match=r"has rows and has lost teacher\.json"):
        CacheWriter(lists.folder, CacheAbout("teacher", None, "fingerprint", 50, TOP_K))


# ---- The head, and what tells another teacher apart ----


def test_a_filling_run_writes_a_head_anew(cache, tmp_path):
    of = cache("states-float32")
    head = of.head
    content = head.read_bytes()
    for rows, damage in ((ROWS, head.unlink), (ROWS + 1, head.unlink), (ROWS + 1, lambda: cut(head))):
        damage()
        with pytest.raises(ValueError, match=rf"{head.name}.* writes it anew"):
            build(tmp_path, **of.read)
        build(tmp_path, rows, **of.fill)
        assert head.read_bytes() == content
    cut(head)
    with pytest.raises(ValueError, match=rf"{head} is damaged .*: delete it, and .* writes it anew"):
        build(tmp_path, **of.fill)


PROBES = {
    "lost": lambda file: file.unlink(),
    "cut": cut,
    "without hidden states": lambda file: save_file({"other": torch.ones(2)}, file),
    "NaN": lambda file: change(file, hidden=load_file(file)["hidden"] * float("nan")),
}


@pytest.mark.parametrize("damage", PROBES)
@pytest.mark.parametrize("rows", [ROWS, ROWS + 1])
def test_rows_that_no_teacher_can_be_compared_with_are_not_gone_on_with(cache, tmp_path, damage, rows):
    of = cache("states-float32")
    PROBES[damage](of.probe)
    with pytest.raises(ValueError, match=r"probe\.safetensors.*: put the file back, name another folder, or read"):
        build(tmp_path, rows, **of.fill)
    assert of.probe.exists() == (damage != "lost")
    build(tmp_path, **of.read)


def test_the_command_refuses_them_too(cache, tmp_path):
    of = cache("states-float32")
    of.probe.unlink()
    trainer = build(tmp_path, teacher_model_name_or_path=str(of.teacher))
    trainer.args.teacher_cache_states = True
    with pytest.raises(ValueError, match=r"has rows and has lost probe\.safetensors"):
        cache_teacher(trainer, str(of.folder), TOP_K)
    assert not of.probe.exists()


def test_a_run_that_ends_before_its_first_row_leaves_a_folder_that_can_be_filled(cache, tmp_path):
    """teacher.json and the head are there then, and perhaps the hidden states of a few tokens; rows are not."""
    for probe in (True, False):
        of = cache("states-float32")
        of.shard.unlink()
        if not probe:
            of.probe.unlink()
        build(tmp_path, **of.fill).train()
        assert of.probe.exists() and len(TeacherCache(of.folder)) == 4
        shutil.rmtree(of.folder)


def test_the_command_line_says_it_in_a_line(cache, tmp_path, capsys, monkeypatch):
    of = cache("states-float32")
    tokenizer = tiny_tokenizer()
    save_tiny(tmp_path / "student", tiny_llama(tokenizer), tokenizer)
    messages_dataset(ROWS).to_json(tmp_path / "data" / "train.jsonl")
    settings = {**CONFIG, **of.fill, "output_dir": str(tmp_path / "out"), "dataset_name": str(tmp_path / "data")}
    (tmp_path / "run.yaml").write_text(json.dumps({**settings, "model_name_or_path": str(tmp_path / "student")}))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as a launcher would
    of.probe.unlink()
    for command in ("train", "cache-teacher"):
        assert cli.main([command, "--config", str(tmp_path / "run.yaml")]) == 2
        assert "has lost probe.safetensors" in capsys.readouterr().err.splitlines()[-1]
