"""What holds for the package as a whole: imports point one way, nothing has two meanings, the public names stay."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import amid_trl


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "amid_trl"

# Folders and files of the package, each of which sees those to its left alone; what stands in one place sees nothing
# of its neighbours there.
ORDER = [
    {"_gkd", "quiet"},
    {"_trl", "outputs", "parser", "phases"},
    {"maths"},
    {"fields"},
    {"run"},
    {"data"},
    {"models"},
    {"teacher", "sources", "evaluation"},
    {"training", "plotting"},
    {"launch"},
    {"choosing", "comparison"},
    {"sweep"},
    {"report"},
    {"cli"},
    {"__main__"},
]
PLACES = {name: place for place, names in enumerate(ORDER) for name in names}
# Imported by the maths, and nothing else.
MATHS_IMPORTS = {"torch", "jaxtyping", "amid_trl", *sys.stdlib_module_names}
# Names that every module, or every folder of named files, may have.
COMMON = {"logger", "main", "T", "FOLDER", "names", "resolve", "config_path", "__getattr__", "__dir__"}


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """All modules by their dotted name below the package; a folder by its own."""
    files = sorted(package.rglob("*.py"))
    assert files
    return {
        ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): file for file in files
    }


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports from the package, wherever in it, below the package."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def arrows(package: Path = PACKAGE) -> list[tuple[str, str, str]]:
    """(module, module that it imports, where) within the package."""
    known, found = modules(package), []
    public = {f"amid_trl.{name}" for name in amid_trl.__all__}
    for module, file in known.items():
        if module == "__init__":
            continue  # the public names, lazily
        for line, name in imported(file):
            if not name.startswith("amid_trl.") or name in public:
                continue
            target = name.removeprefix("amid_trl.")
            while target not in known:
                target, dot, _ = target.rpartition(".")
                assert dot, f"{file}:{line}: {name} is in no module"
            found.append((module, target, f"{file.relative_to(package)}:{line}"))
    return found


def violations(package: Path = PACKAGE) -> list[str]:
    """Imports from a folder's right, or from a neighbour in the same place."""
    wrong = []
    for module, target, where in arrows(package):
        mine, theirs = module.split(".")[0], target.split(".")[0]
        assert {mine, theirs} <= PLACES.keys(), f"{mine} or {theirs} has no place in ORDER"
        if mine != theirs and PLACES[theirs] >= PLACES[mine]:
            wrong.append(f"{where} imports {target}")
    return wrong


def circle(package: Path = PACKAGE) -> list[str]:
    """Modules that import each other in a circle, if there are any."""
    graph = defaultdict(set)
    for module, target, _ in arrows(package):
        if module != target:
            graph[module].add(target)
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for target in sorted(graph[module]):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def test_imports_point_to_the_left():
    assert not violations()


def test_no_files_import_each_other_in_a_circle():
    assert not circle()


@pytest.fixture
def planted(tmp_path):
    """A copy of the package's imports, with one more of them in a file."""

    def plant(module: str, line: str) -> Path:
        copy = tmp_path / "amid_trl"
        for name, file in modules().items():
            place = copy / file.relative_to(PACKAGE)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(file.read_text() + (f"\n\ndef planted():\n    {line}\n" if name == module else ""))
        return copy

    return plant


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("maths.kernel", "from amid_trl.data.rows import UNTRAINED", "imports data.rows"),
        ("teacher.server", "from amid_trl.sources.source import Source", "imports sources.source"),
        ("training.trainer", "import amid_trl.launch.names", "imports launch.names"),
        ("evaluation.sets", "from amid_trl.training import config", "imports training.config"),
        ("outputs", "from amid_trl import _trl", "imports _trl"),
    ],
)
def test_an_import_to_the_right_is_found(planted, module, line, found):
    [message] = violations(planted(module, line))
    assert message.endswith(found)


def test_a_circle_within_a_folder_is_found(planted):
    assert not circle(planted("maths.kernel", "pass"))
    copy = planted("maths.kernel", "from amid_trl.maths.linear import Head")
    assert not violations(copy)
    assert set(circle(copy)) == {"maths.kernel", "maths.linear"}


def test_the_maths_need_torch_alone():
    files = list((PACKAGE / "maths").glob("*.py"))
    assert len(files) > 5
    for file in files:
        assert {name.split(".")[0] for _, name in imported(file)} <= MATHS_IMPORTS, file


def test_no_name_has_two_meanings():
    homes = defaultdict(set)
    for module, file in modules().items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            else:
                continue
            for name in names:
                if not name.startswith("_") and name not in COMMON:
                    homes[name].add(module)
    homes.pop("jeffreys")  # the divergence, and the objective that is nothing else
    twice = {name: sorted(where) for name, where in homes.items() if len(where) > 1}
    assert not twice, twice


def test_no_file_is_long():
    for file in (*modules().values(), *(ROOT / "tests").rglob("*.py")):
        lines = len(file.read_text().splitlines())
        assert lines <= (350 if file.name == "trainer.py" else 400), f"{file} has {lines} lines"


def test_importing_the_package_is_light():
    code = "import sys, amid_trl; print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_trainer_is_imported_without_what_only_commands_need_and_collects_garbage_afterwards():
    unneeded = ("optuna", "ray", "matplotlib", "starlette", "uvicorn", "deepspeed", "rouge_score", "setuptools")
    code = (
        "import gc, sys; from amid_trl import AMiDTrainer; "
        f"print(gc.isenabled(), [name for name in {unneeded} if name in sys.modules]); gc.disable(); "
        "from amid_trl import AMiDConfig; print(gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True []\nFalse\n"


def test_the_public_names_stay():
    assert sorted(amid_trl.__all__) == [
        "AMiDConfig",
        "AMiDTrainer",
        "DIVERGENCES",
        "OBJECTIVES",
        "Objective",
        "alpha_mixture",
        "linear_distillation_loss",
    ]
    assert all(getattr(amid_trl, name) is not None for name in amid_trl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = amid_trl.nothing


def test_objectives_and_divergences_keep_their_names():
    objectives = "kd rkl csd gkd skl srkl taid abkd tvd wsd jeffreys akl bdkd eopd amid"
    assert list(amid_trl.OBJECTIVES) == objectives.split()
    assert list(amid_trl.DIVERGENCES) == ["kl", "js", "tv", "alpha", "ab", "hellinger", "renyi", "jeffreys", "chi2"]


def test_every_objective_and_divergence_is_in_the_docs():
    concepts = (ROOT / "docs" / "objectives.md").read_text()
    for name in [*amid_trl.OBJECTIVES, *amid_trl.DIVERGENCES]:
        assert f"`{name}`" in concepts, name
