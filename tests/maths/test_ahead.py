"""What is compiled ahead is the plain kernel, and what cannot be is compiled when it is needed."""

import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from amid_trl import OBJECTIVES
from amid_trl.maths import ahead, kernel
from amid_trl.maths.kernel import Finish, RowKernel
from amid_trl.maths.selection import Selection
from amid_trl.maths.sparse import SparseTokenLoss, sparse_top_k
from amid_trl.maths.token_loss import DistillationTokenLoss, cross_entropy
from amid_trl.outputs import sole_use


VOCAB = 53


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A folder without files, and a process that has begun nothing."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernel, "COMPILE_FROM_VOCAB", 0)
    monkeypatch.setattr(ahead, "_begun", {})
    kernel._compiled.cache_clear()
    yield
    kernel._compiled.cache_clear()


def row_kernel(differentiates: bool = True, lam: float = 0.3, moves: bool = False) -> RowKernel:
    token_loss = DistillationTokenLoss(OBJECTIVES["amid"](lam=lam), moves=moves, alpha_stays=moves)
    return RowKernel(token_loss, Finish(), Finish(), differentiates)


def rows(count: int = 5, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    if device == "meta":
        logits = [torch.empty(count, VOCAB, device=device) for _ in range(2)]
        return *logits, torch.empty(count, dtype=torch.long, device=device)
    generator = torch.Generator().manual_seed(count)
    student, teacher = (3 * torch.randn(count, VOCAB, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(VOCAB, (count,), generator=generator)


def wanted(*kernels: RowKernel):
    return [each.ahead(*rows(2, "meta")) for each in kernels]


def file_of(each: RowKernel):
    return ahead._file(*each.ahead(*rows(2, "meta")), torch.get_num_threads())


def start_again(monkeypatch):
    monkeypatch.setattr(ahead, "_begun", {})
    kernel._compiled.cache_clear()


def without_teacher(count: int) -> tuple[torch.Tensor, ...]:
    student, _, labels = rows(count)
    return student, labels


def with_likeliest(count: int) -> tuple[torch.Tensor, ...]:
    student, teacher, labels = rows(count)
    return student, labels, *sparse_top_k(teacher, 7)


@pytest.mark.parametrize(
    ("each", "rows"),
    [
        (row_kernel(), rows),
        (row_kernel(differentiates=False), rows),
        (row_kernel(moves=True), rows),
        (RowKernel(cross_entropy, Finish(), None, True), without_teacher),
        (RowKernel(SparseTokenLoss(OBJECTIVES["amid"]()), Finish(), None, True), with_likeliest),
    ],
    ids=["fixed", "without gradient", "moving", "cross-entropy", "likeliest tokens"],
)
def test_what_the_compiler_is_given_is_the_plain_kernel(each, rows, tmp_path):
    owner, method, types = ahead.from_json(ahead.as_json(each.ahead(*rows(2))))
    given = ahead.exported(ahead.Job(owner, method, types, 1, tmp_path / "file.pt2")).module()
    for count in (5, 2):
        _, tensors = each._traced(*rows(count))
        expected = [tensor for tensor in each.plain(*rows(count)) if tensor is not None]
        for mine, plain in zip(given(*tensors), expected, strict=True):
            torch.testing.assert_close(mine, plain)


def test_one_that_holds_the_folder_and_does_nothing_is_not_waited_for_for_ever(monkeypatch):
    """Such as a process that was stopped while it compiled."""
    monkeypatch.setattr(ahead, "PATIENCE", 0.3)
    done = []
    monkeypatch.setattr(ahead, "_compile", lambda job, sources: done.append(job))
    file = file_of(row_kernel())
    jobs = [ahead.Job(*wanted(row_kernel())[0], 1, file.with_name(name)) for name in ("one.pt2", "two.pt2")]
    with sole_use(file.parent):
        begun = time.monotonic()
        ahead.work(ahead.as_json(jobs), ahead._sources())
    assert done == jobs and 0.3 <= time.monotonic() - begun < 10


@pytest.fixture
def compiler(monkeypatch):
    """torch's, which makes in a moment a file that says how often it was asked."""
    asked = []

    def compile_and_package(program, package_path, inductor_configs):
        asked.append(program)
        Path(package_path).write_text(f"compiled {len(asked)}")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", compile_and_package)
    return asked


def test_a_damaged_file_is_compiled_anew_and_what_was_left_beside_it_goes(compiler):
    file = file_of(row_kernel())
    job = ahead.Job(*wanted(row_kernel())[0], 1, file)
    file.parent.mkdir()
    file.write_bytes(b"half of a file")
    (file.parent / f".123.{file.name}").write_bytes(b"of a compilation that was killed")
    ahead.work(ahead.as_json([job]), ahead._sources())
    assert file.read_text() == "compiled 1"
    assert {path.name for path in file.parent.iterdir()} == {".lock", file.name}


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """The maths in a folder of its own, where it may change."""
    folder = tmp_path / "maths"
    shutil.copytree(Path(ahead.__file__).parent, folder)
    monkeypatch.setattr(ahead, "__file__", str(folder / "ahead.py"))
    return folder


@pytest.mark.parametrize("when", ["before", "during"])
def test_what_is_made_of_changed_sources_is_not_kept(compiler, sources, monkeypatch, when):
    job = ahead.Job(*wanted(row_kernel())[0], 1, file_of(row_kernel()))
    of_run = ahead._sources()

    def change(*_, package_path="", **__):
        sources.joinpath("objective.py").write_text("# another one\n")
        Path(package_path or sources / "built").touch()

    if when == "before":
        change()
    else:
        monkeypatch.setattr("torch._inductor.aoti_compile_and_package", change)
    with pytest.raises(RuntimeError, match="the code is no longer that of the run"):
        ahead.work(ahead.as_json([job]), of_run)
    assert not compiler and [path.name for path in job.file.parent.iterdir()] == [".lock"]


def test_a_run_tells_the_compiler_of_which_sources_it_is(monkeypatch, tmp_path, sources):
    """Also where they have changed since: its file is named after what it computes with."""
    monkeypatch.setattr(ahead, "COMPILER", "import sys; open('given', 'w').write(sys.stdin.read())")
    monkeypatch.chdir(tmp_path)
    ahead._sources_of_run.cache_clear()
    of_run, file = ahead._sources(), file_of(row_kernel())
    sources.joinpath("objective.py").write_text("# another one\n")
    assert file_of(row_kernel()) == file
    ahead.begin(wanted(row_kernel()))
    ahead.compiled(*wanted(row_kernel())[0], wait=lambda: None)
    assert json.loads(Path("given").read_text())["sources"] == of_run
    ahead._sources_of_run.cache_clear()


@pytest.mark.parametrize(("there", "runs"), [(True, 1), (False, 0)])
def test_a_process_that_cannot_read_a_file_has_it_compiled_once_more(monkeypatch, there, runs):
    monkeypatch.setattr(ahead, "COMPILER", "open('runs', 'a').write('.')")
    monkeypatch.chdir(folder := file_of(row_kernel()).parent.parent)
    (folder / "amid_trl").mkdir()
    file_of(row_kernel()).write_bytes(b"half of a file")
    ahead.begin(wanted(row_kernel()))
    if not there:
        file_of(row_kernel()).unlink()
    assert ahead.compiled(*wanted(row_kernel())[0], wait=lambda: None) is None
    assert (Path("runs").read_text() if Path("runs").exists() else "") == runs * "."


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # the compiler's own
def test_a_kernel_compiled_ahead_is_the_plain_one_and_is_compiled_once(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled here"))
    kernels = [row_kernel(), row_kernel(differentiates=False), row_kernel(moves=True)]
    ahead.begin(wanted(*kernels))
    [process] = set(ahead._begun.values())
    for each in kernels:
        for count in (5, 2, 17, 1):
            given = rows(count)
            for mine, plain in zip(each(*given), each.plain(*given), strict=True):
                assert (mine is None) == (plain is None)
                if mine is not None:
                    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=2e-6)
    process.join()

    first = row_kernel()(*rows())
    with monkeypatch.context() as patched:
        patched.setattr(ahead.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
        start_again(monkeypatch)
        ahead.begin(wanted(*kernels))
        assert all(map(torch.equal, row_kernel()(*rows()), first))

    file = file_of(row_kernel())
    file.write_bytes(file.read_bytes()[:-1000])  # as of a machine that stopped while it wrote
    start_again(monkeypatch)
    ahead.begin(wanted(*kernels))
    assert all(map(torch.equal, row_kernel()(*rows()), first))


def test_a_kernel_that_moves_has_one_file_for_all_its_windows():
    assert file_of(row_kernel(moves=True)) == file_of(row_kernel(moves=True, lam=0.7))
    assert file_of(row_kernel()) != file_of(row_kernel(lam=0.7))


def test_a_file_is_of_one_number_of_threads_and_of_the_code_behind_it(monkeypatch):
    given = row_kernel().ahead(*rows(2, "meta"))
    assert ahead._file(*given, 1) == ahead._file(*given, 1) != ahead._file(*given, 2)
    before = ahead._file(*given, 1)
    monkeypatch.setattr(ahead, "_sources_of_run", lambda: "other code")
    assert ahead._file(*given, 1) != before


def test_what_fails_ahead_is_compiled_when_it_is_needed(monkeypatch, caplog):
    monkeypatch.setattr(ahead, "COMPILER", "raise SystemExit('no compiler')")
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    given, each = rows(), row_kernel()
    with caplog.at_level(logging.DEBUG, logger="amid_trl.maths.ahead"):
        ahead.begin(wanted(each))
        for mine, plain in zip(each(*given), each.plain(*given), strict=True):
            torch.testing.assert_close(mine, plain)
    assert "no compiler" in caplog.text


def without_home(monkeypatch):
    """As for a user that no list of users has."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)


def with_a_home_that_cannot_be_looked_at(monkeypatch):
    """Its name is too long: an OSError for root too, who may look into everybody's."""
    monkeypatch.setenv("HOME", "/" + 300 * "x")


@pytest.mark.parametrize("home", [without_home, with_a_home_that_cannot_be_looked_at])
def test_without_a_folder_of_its_own_a_process_compiles_when_it_needs_to(monkeypatch, home):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    home(monkeypatch)
    ahead.begin(wanted(row_kernel()))
    assert ahead.compiled(*wanted(row_kernel())[0], wait=lambda: None) is None


@pytest.mark.parametrize("name", OBJECTIVES)
def test_another_process_is_told_of_the_same_kernel(name):
    token_loss = DistillationTokenLoss(OBJECTIVES[name](), 0.5, selection=Selection("prefix", count=3))
    assert token_loss.compiles
    each = RowKernel(token_loss, Finish(0.5, 30.0), Finish(), True)
    assert ahead.from_json(json.loads(json.dumps(ahead.as_json(each)))) == each


def test_nothing_but_the_maths_is_made_of_what_is_told():
    with pytest.raises(ValueError, match="no class of the maths"):
        ahead.from_json({"kind": "subprocess:Popen", "args": "ls"})


@pytest.mark.parametrize("begun", [False, True])
def test_what_was_not_begun_is_not_waited_for(monkeypatch, begun):
    if begun:
        monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
        ahead.begin(wanted(row_kernel()))
    given = row_kernel().ahead(*rows(2, "meta"))
    assert ahead.compiled(*given, wait=lambda: pytest.fail("waits")) is None
