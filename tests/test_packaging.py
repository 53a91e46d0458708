"""What is built of the package, where it can be installed, and what its extras ask for."""

import json
import os
import re
import runpy
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import distributions
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from tiny import messages_dataset

import amid_trl
from amid_trl import cli


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "scripts" / "amid.py"


def given() -> dict:
    """What setup.py tells setuptools."""
    with patch("setuptools.setup") as setup, patch.object(sys, "argv", ["setup.py", "--version"]):
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def requirements(extra: str) -> list[str]:
    """What setup.py asks for, with an extra."""
    return [*given()["install_requires"], *given()["extras_require"][extra]]


def reaches_an_index() -> bool:
    """Whether pip finds a package that is everywhere, without which no other is missing."""
    flags = ["-q", "--dry-run", "--ignore-installed", "--no-deps"]
    command = [sys.executable, "-m", "pip", "install", *flags, "packaging"]
    return subprocess.run(command, capture_output=True).returncode == 0


def resolved(tmp_path: Path, *asked: str, constraints: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """What pip would install of the package index, by name; of most it reads the metadata alone."""
    flags = ["--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--report", str(tmp_path / "report.json")]
    flags += ["--only-binary=:all:"] * any(text.startswith("--python-version") for text in asked)
    command = [sys.executable, "-m", "pip", "install", *flags, "-c", str(constraints), *asked]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 and not reaches_an_index():
        pytest.skip("no package index is reached")
    assert done.returncode == 0, done.stderr[-3000:]
    installed = json.loads((tmp_path / "report.json").read_text())["install"]
    return {each["metadata"]["name"].lower().replace("-", "_"): each["metadata"]["version"] for each in installed}


# ---- What is built ----


def tracked() -> list[str]:
    """The files of this checkout, as git knows them, the new ones too."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist of a copy of this checkout, and the wheel that is built of the unpacked sdist."""
    folder = tmp_path_factory.mktemp("built")
    for name in tracked():
        if name.split("/")[0] not in ("tests", "benchmarks", "docs", "examples", "findings"):
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "copy" / name).write_bytes((ROOT / name).read_bytes())
    build = "import sys; from setuptools import build_meta; getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2])"

    def make(kind: str, source: Path) -> Path:
        command = [sys.executable, "-c", build, kind, str(folder)]
        subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
        [made] = folder.glob("*.tar.gz" if kind == "sdist" else "*.whl")
        return made

    sdist = make("sdist", folder / "copy")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return sdist, make("wheel", folder / sdist.name.removesuffix(".tar.gz"))


def test_the_sdist_and_the_wheel_have_every_file_of_the_package(built):
    sdist, wheel = built
    package = {name for name in tracked() if name.startswith("amid_trl/")}
    assert len([name for name in package if name.endswith(".yaml")]) >= 7 + 6 + 5  # recipes, engines, sets
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package | {"README.md", "LICENSE", "setup.py", "pyproject.toml"} <= names
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == package
    assert wheel.name == f"amid_trl-{amid_trl.__version__}-py3-none-any.whl"


def test_the_version_stands_in_one_place():
    assert given()["version"] == amid_trl.__version__
    others = [name for name in tracked() if name.endswith((".py", ".cff", ".toml", ".md"))]
    line = re.compile(r"^\s*[\"']?_*version_*[\"']?\s*[:=]\s*[\"']?\d", re.MULTILINE)
    told = [name for name in others if not name.startswith("tests/") and line.search((ROOT / name).read_text())]
    assert told == ["amid_trl/__init__.py"]


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The commands' folder of a new environment: the wheel, and the packages that these tests have."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(built[1])]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    # A .pth file of a folder that is named in one is not read, so that no editable install is found through it.
    [site] = folder.glob("lib/*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


def elsewhere() -> dict[str, str]:
    """The environment of a process that finds no checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def outside(tmp_path: Path, *command: str | Path) -> str:
    """What a command says, run where there is no checkout; it has to succeed."""
    done = subprocess.run(command, cwd=tmp_path, env=elsewhere(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


OF_US = [name for name in (*cli.COMMANDS, *cli.LAUNCHED) if name != "compared-run"]


def test_an_installed_wheel_is_what_runs_outside_the_checkout(installed, tmp_path):
    where = "import amid_trl; print(amid_trl.__file__, amid_trl.__version__)"
    file, version = outside(tmp_path, installed / "python", "-c", where).split()
    assert Path(file).is_relative_to(installed.parent) and version == amid_trl.__version__
    said = outside(tmp_path, installed / "amid-trl", "--help")
    assert all(f"\n    {command} " in said for command in OF_US)
    assert f"- amid_trl: {amid_trl.__version__}\n" in outside(tmp_path, installed / "amid-trl", "env")


@pytest.mark.parametrize("command", OF_US)
def test_a_command_of_an_installed_wheel_has_its_help(command, installed, tmp_path):
    """That of train names the recipes, that of evaluate the sets, each the files of a folder."""
    said = outside(tmp_path, installed / "amid-trl", command, "--help")
    assert f"usage: amid-trl {command}" in said
    folders = {"train": "launch/recipes", "evaluate": "evaluation/sets"}
    files = (ROOT / "amid_trl" / folders[command]).glob("*.yaml") if command in folders else ()
    assert all(file.stem in said for file in files)


def test_an_installed_wheel_has_its_page(installed, tmp_path):
    state = {"global_step": 2, "log_history": [{"step": step, "loss": 1 / step, "kl": 1 / step} for step in (1, 2)]}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer_state.json").write_text(json.dumps(state))
    outside(tmp_path, installed / "amid-trl", "report", "out")
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory, models, rows_file) -> Path:
    """A folder of what the commands read: models, rows, and a file for each command that takes one."""
    place = tmp_path_factory.mktemp("place")
    for name in ("student", "teacher"):
        (place / name).symlink_to(models[name])
    (place / "rows.jsonl").symlink_to(rows_file)
    for split in ("train", "test"):
        messages_dataset(4).to_json(place / "data" / f"{split}.jsonl")
    run = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher", "dataset_name": "data"}
    run |= {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 2}
    searched = {"space": {"assistant_alpha": [-3.0, 0.5]}, "metric": "eval_kl", "trials": 1, "evaluations": 1}
    compared = {"runs": {"kd": {"objective": "kd"}}, "seeds": [0]}
    files = {"run": {**run, "max_steps": 1, "output_dir": "out"}}
    files["compare"] = {"base": run, **compared, "metrics": ["eval_kl"], "budget": {"steps": 1}}
    files["sweep"] = {"base": run, **searched, "budget": {"steps": 1}}
    for name, content in files.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return place


# Each in its shortest form, and a file that it leaves behind.
SHORTEST = {
    "env": ("", "run.yaml"),
    "init-student": ("teacher smaller --drop-layers 0", "smaller/model.safetensors"),
    "cache-teacher": ("--config run.yaml --lmbda 0 --teacher_cache cache", "cache"),
    "train": (
        # The recipe asks for an evaluation, which is left out here as a user would.
        "--config abkd --accelerate_config single --model_name_or_path student --teacher_model_name_or_path teacher "
        "--dataset_name data --output_dir out --use_cpu --bf16=False --max_steps=1 --eval_strategy=no "
        "--per_device_train_batch_size=2 --gradient_accumulation_steps=1 --use_peft --lora_target_modules q_proj",
        "out/adapter_model.safetensors",
    ),
    "merge": ("out merged", "merged/model.safetensors"),
    "evaluate": (
        "merged --teacher teacher --seeds 0 --output-dir measured --evaluation-set rows.jsonl --max-new-tokens 4",
        "measured/results.json",
    ),
    "landscape": ("--config run.yaml --output_dir runs/grid --rows 2", "runs/grid/landscape.png"),
    "compare": ("compare.yaml --output-dir runs/compare", "runs/compare/comparison.png"),
    "sweep": ("sweep.yaml --output-dir runs/sweep", "runs/sweep/best.yaml"),
    "report": ("out runs/compare runs/sweep runs/grid measured --output page.html", "page.html"),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_of_an_installed_wheel_does_its_work(installed, place):
    """In this order, for some read what those before have written."""
    assert {*SHORTEST, "serve-teacher"} == {*OF_US}
    for command, (arguments, left) in SHORTEST.items():
        outside(place, installed / "amid-trl", command, *arguments.split())
        assert (place / left).exists(), command
    server = [installed / "amid-trl", "serve-teacher", "teacher", "--port", "0"]
    with subprocess.Popen(server, cwd=place, env=elsewhere(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and "http://127.0.0.1:" in process.stdout.readline()
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_installs_with_all_it_needs_into_an_empty_environment(built, tmp_path):
    """With what the package index has; nothing of this environment is seen."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=120)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(built[1])]
    done = subprocess.run(install, capture_output=True, text=True, timeout=1500)
    if done.returncode != 0 and not reaches_an_index():
        pytest.skip("no package index is reached")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "- trl: " in outside(tmp_path, python.with_name("amid-trl"), "env")
    config = "from amid_trl import AMiDConfig; print(AMiDConfig('out', use_cpu=True, bf16=False).objective)"
    assert outside(tmp_path, python, "-c", config) == "amid\n"


# ---- Where it can be installed ----


def test_the_pythons_that_are_declared_are_those_that_are_admitted():
    declared = [line.rpartition(" ")[2] for line in given()["classifiers"] if ":: Python ::" in line]
    assert declared == ["3.11", "3.12", "3.13"]
    admitted = SpecifierSet(given()["python_requires"])
    assert all(version in admitted for version in declared) and "3.10" not in admitted


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.13.0"])
def test_what_is_installed_admits_the_first_release_of_every_python(python):
    """Debian 12 has 3.11.2, and some packages ask for a later 3.11."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    found = [each for each in distributions() if pinned.get(canonicalize_name(each.name)) == each.version]
    assert len(found) > 100
    asked = {each.name: each.metadata["Requires-Python"] for each in found}
    assert not {name: pythons for name, pythons in asked.items() if pythons and python not in SpecifierSet(pythons)}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_pinned_versions_resolve_for_every_python(built, tmp_path, python):
    """Wheels for it alone, whose metadata is read; nothing is installed. It needs the package index."""
    found = resolved(tmp_path, str(built[1]), f"--python-version={python}", f"--target={tmp_path / 'unused'}")
    assert {"amid_trl", "torch", "trl", "transformers"} <= found.keys()


def header() -> dict:
    """PEP 723's, of the script in TRL's style."""
    text = SCRIPT.read_text()
    [block] = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", text, flags=re.MULTILINE)
    return tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))


def test_the_header_of_the_script_names_this_checkout():
    """What runs the script alone finds it, and a Python that it admits."""
    assert header()["requires-python"] == given()["python_requires"]
    assert header()["dependencies"] == [given()["name"]]
    source = header()["tool"]["uv"]["sources"][given()["name"]]["path"]
    assert (SCRIPT.parent / source).resolve() == ROOT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_the_header_asks_for_resolves(built, tmp_path):
    """Its dependencies, of which amid_trl is the wheel of this checkout. It needs the package index."""
    assert header()["dependencies"] == ["amid_trl"]
    version = f"--python-version={sys.version_info.major}.{sys.version_info.minor}"
    given_folder = f"--find-links={built[1].parent}"
    found = resolved(tmp_path, *header()["dependencies"], given_folder, version, f"--target={tmp_path / 'unused'}")
    assert found["amid_trl"] == amid_trl.__version__


# ---- What the extras ask for ----


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_resolves_with_the_pinned_versions_but_numpys(tmp_path):
    """As docs/sources.md has it. Of vLLM's requirements the metadata alone is read; it needs the package index."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("numpy==")]
    (tmp_path / "with-vllm.txt").write_text("\n".join(pins))
    versions = resolved(tmp_path, *requirements("vllm"), constraints=tmp_path / "with-vllm.txt")
    assert "vllm" in versions
    for name in ("transformers", "trl", "peft", "accelerate", "datasets"):
        assert f"{name}=={versions[name]}" in pins
