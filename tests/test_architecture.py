"""What holds for the package as a whole: imports point down, the public names stay, documents match the code."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import amid_trl
from amid_trl import _trl


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "amid_trl"

# Lower layers first; a module imports from its own layer and from those above it in this list.
LAYERS = {
    "maths": ["assistant", "divergences", "objective", "kernel", "linear", "token_loss", "sparse", "schedules"],
    "batches": [
        "sampling",
        "replay",
        "rows",
        "conversations",
        "batches",
        "data",
        "generation",
        "plain_text",
        "teacher_cache",
        "teacher_server",
    ],
    "training": [
        "_trl",
        "absent_teacher",
        "answers",
        "batch_loss",
        "building",
        "card",
        "checkpoint",
        "completions",
        "config",
        "engines",
        "evaluation",
        "fsdp",
        "memory",
        "metrics",
        "nonfinite",
        "placement",
        "run_objective",
        "sources",
        "student",
        "survival",
        "teacher",
        "teachers",
        "trainer",
        "validation",
        "windows",
        "writers",
    ],
    "entry": [
        "__init__",
        "__main__",
        "accelerate_configs",
        "arguments",
        "caching",
        "cli",
        "compare",
        "compare_report",
        "compared_run",
        "comparison",
        "evaluate",
        "evaluation_models",
        "evaluation_options",
        "evaluation_results",
        "evaluation_sets",
        "harness",
        "outputs",
        "plotting",
        "recipes",
        "statistics",
        "train",
    ],
}
# Imported by modules of the maths layer, and nothing else.
STANDARD_LIBRARY = {
    "collections",
    "dataclasses",
    "functools",
    "inspect",
    "itertools",
    "logging",
    "math",
    "threading",
    "typing",
}
MATHS_IMPORTS = {"torch", "jaxtyping", "amid_trl", *STANDARD_LIBRARY}


def imports(module: str) -> set[str]:
    file = PACKAGE / f"{module}.py"
    tree = ast.parse((file if file.exists() else PACKAGE / module / "__init__.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "amid_trl" else {node.module}
            )
    return names


def test_every_module_has_a_layer():
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert modules == {module for layer in LAYERS.values() for module in layer}


def test_imports_point_down():
    allowed: set[str] = set()
    for modules in LAYERS.values():
        allowed |= set(modules)
        for module in modules:
            ours = {name.split(".")[1] for name in imports(module) if name.startswith("amid_trl.")}
            public = {name for name in ours if name in amid_trl.__all__}
            assert ours - public <= allowed, f"{module} imports {ours - allowed} from a higher layer"


def test_the_maths_layer_needs_torch_alone():
    for module in LAYERS["maths"]:
        assert {name.split(".")[0] for name in imports(module)} <= MATHS_IMPORTS


def test_importing_the_package_is_light():
    code = "import sys, amid_trl; print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_private_names_of_trl_and_transformers_are_used_in_one_place():
    for path in PACKAGE.glob("*.py"):
        if path.stem == "_trl":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("trl", "transformers"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private and node.module not in ("trl.models.utils", "trl.trainer.utils"), (
                    f"{path}: {private}"
                )


def test_the_names_borrowed_from_trl_are_listed():
    assert sorted(_trl.__all__) == [
        "ACCELERATE_CONFIGS",
        "GKDConfig",
        "GKDTrainer",
        "accelerate_launch",
        "announce_head",
        "backbone_states",
        "causal_lm",
        "create_model_from_path",
        "forward_redirection",
        "gathered_head",
        "global_then_local_main_first",
        "is_vllm_available",
        "language_model_head",
        "launch_arguments",
        "loaded_whole",
        "prepare_deepspeed",
        "print_prompt_completions_sample",
        "unknown_to_launcher",
        "unwrap_model_for_generation",
        "use_adapter",
        "vllm_engine",
        "whole_head",
    ]
    assert all(hasattr(_trl, name) for name in _trl.__all__)


def test_trls_notice_for_those_who_import_it_is_not_shown_to_ours():
    environment = {name: value for name, value in os.environ.items() if name != "TRL_EXPERIMENTAL_SILENCE"}
    command = [sys.executable, "-c", "from amid_trl import AMiDConfig, AMiDTrainer"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stderr
    assert "trl.experimental" not in said


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
    objectives = [
        "kd",
        "rkl",
        "csd",
        "gkd",
        "skl",
        "srkl",
        "taid",
        "abkd",
        "tvd",
        "wsd",
        "jeffreys",
        "akl",
        "bdkd",
        "amid",
    ]
    assert list(amid_trl.OBJECTIVES) == objectives
    assert list(amid_trl.DIVERGENCES) == ["kl", "js", "tv", "alpha", "ab", "hellinger", "renyi", "jeffreys", "chi2"]


def test_an_installed_package_has_its_yaml_files(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    built = {path.parts[-2:] for path in tmp_path.glob("lib*/amid_trl/*/*.yaml")}
    assert built == {path.parts[-2:] for path in PACKAGE.glob("*/*.yaml")}


def test_the_readme_lists_every_module():
    readme = (ROOT / "README.md").read_text()
    for path in PACKAGE.glob("*.py"):
        if path.stem not in ("__init__", "__main__"):
            assert f"{path.name} " in readme, f"README.md does not say what {path.name} is"


def test_every_objective_and_divergence_is_in_the_docs():
    concepts = (ROOT / "docs" / "objectives.md").read_text()
    for name in [*amid_trl.OBJECTIVES, *amid_trl.DIVERGENCES]:
        assert f"`{name}`" in concepts, name
