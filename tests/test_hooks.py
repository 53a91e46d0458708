"""What we need of TRL, transformers, accelerate, PEFT and DeepSpeed beyond their promises is in HOOKS, and is there.

Half of the tests compare HOOKS with the installed versions, the other half with our own code, by walking through it.
"""

import ast
from importlib.metadata import version

import pytest
from hooks import (
    ALIASES,
    OURS,
    PACKAGE,
    Files,
    methods,
    missing,
    narrow_overrides,
    parsed,
    unlisted_attributes,
    unlisted_imports,
    unlisted_overrides,
    unlisted_parameters,
)

from amid_trl import AMiDTrainer
from amid_trl._trl import HOOKS, Hook


@pytest.fixture(scope="module")
def files() -> Files:
    """The text of every file of the package."""
    found = {str(file.relative_to(PACKAGE)): file.read_text() for file in sorted(PACKAGE.rglob("*.py"))}
    assert len(found) > 50
    return found


def nothing(found: list[str]) -> None:
    assert not found, "\n".join(found)


# ---- What is installed ----


def test_every_hook_is_installed_with_the_parameters_that_we_rely_on():
    nothing(missing(HOOKS))


def test_no_hook_is_named_twice():
    assert len({hook.name for hook in HOOKS}) == len(HOOKS)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("transformers.Trainer._evaluate", {"name": "transformers.Trainer._evaluate_now"}, "_evaluate_now"),
        ("transformers.Trainer._loss_shifts_labels", {"name": "transformers.Trainer._shifts"}, "_shifts"),
        ("trl.trainer.utils.use_adapter", {"name": "trl.trainer.adapters.use_adapter"}, "adapters"),
        ("trl.SFTTrainer.compute_loss", {"parameters": ("model", "num_tokens")}, "no parameter num_tokens"),
    ],
)
def test_a_hook_that_is_gone_is_named(old, new, found):
    hooks = {hook.name: hook for hook in HOOKS}
    [message] = missing((*HOOKS, hooks[old]._replace(**new)))
    assert found in message and hooks[old].why in message and version(hooks[old].name.split(".")[0]) in message


def test_a_hook_that_we_do_without_may_be_gone():
    [ours] = missing((Hook("trl.experimental.gone.GKDConfig", "read", "fields"),))
    assert "trl.experimental.gone.GKDConfig" in ours
    assert not missing((Hook("trl.experimental.gone.GKDConfig", "read", "fields", optional=True),))


# ---- What we override ----


def test_all_that_we_override_is_listed():
    nothing(unlisted_overrides(OURS, HOOKS))


def test_all_that_is_listed_as_overridden_is():
    listed = {hook.name.split(".")[-1] for hook in HOOKS if hook.how == "overridden"}
    assert listed == {name for ours in OURS for name, member in methods(ours) if callable(member)}


def test_overrides_take_what_their_callers_pass():
    nothing(narrow_overrides(OURS))


def test_an_override_that_is_not_listed_is_found():
    class Planted(AMiDTrainer):
        _memory_tracker = None

        def _save(self, output_dir=None, state_dict=None):
            """A parameter by name, where HOOKS has none."""

        def get_train_dataloader(self):
            """Not in HOOKS."""

    overrides = unlisted_overrides((Planted,), HOOKS)
    assert [message.split()[0] for message in overrides if "not in HOOKS" in message] == [
        "Planted._memory_tracker",
        "Planted.get_train_dataloader",
    ]
    assert "Planted._save takes state_dict, which transformers.Trainer._save in HOOKS does not list" in overrides


def test_an_override_that_takes_less_is_found():
    class Planted(AMiDTrainer):
        def _get_output_dir(self):
            """The trial is missing."""

        def _save_checkpoint(self, trial, model):
            """In another order."""

    less, *order = narrow_overrides((Planted,))
    assert "Planted._get_output_dir does not take TRL's trial" in less
    assert order == [
        "Planted._save_checkpoint takes model for trial",
        "Planted._save_checkpoint takes trial for model",
    ]


# ---- What we import ----


def test_all_that_is_imported_is_public_or_listed(files):
    nothing(unlisted_imports(files, HOOKS))


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("models/pairs.py", "from transformers.trainer_pt_utils import nested_detach", "for _trl.py to do"),
        ("models/pairs.py", "from transformers import _LazyModule", "for _trl.py to do"),
        ("models/pairs.py", "import trl.models.utils", "for _trl.py to do"),
        ("models/pairs.py", "from transformers import utils", "for _trl.py to do"),
        ("models/pairs.py", "from peft.utils import other", "for _trl.py to do"),
        ("models/pairs.py", "import deepspeed", "for models/deepspeed.py to do"),
        ("models/deepspeed.py", "from deepspeed.runtime import engine", "deepspeed.runtime.engine, which is not in"),
        (
            "launch/flags.py",
            "source_file('trl.trainer.grpo_config')",
            "names trl.trainer.grpo_config, which is not in",
        ),
        ("_trl.py", "from trl.trainer.utils import pad", "trl.trainer.utils.pad, which is not in HOOKS"),
    ],
)
def test_an_import_that_is_not_listed_is_found(files, file, line, found):
    [message] = unlisted_imports(files | {file: f"{files[file]}\n\ndef planted():\n    {line}\n"}, HOOKS)
    assert message.startswith(file) and found in message


# ---- What we read, set and call on objects ----


def test_all_that_is_private_is_listed(files):
    nothing(unlisted_attributes(files, HOOKS))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("training/trainer.py", "self._past"),
        ("training/trainer.py", "self._memory_tracker"),
        ("training/trainer.py", "self.current_gradient_accumulation_steps"),
        ("training/engines.py", "trainer.is_fsdp_enabled"),
        ("models/generation.py", "model._is_hf_initialized"),
        ("models/generation.py", "getattr(model, '_is_hf_initialized', False)"),
        ("models/generation.py", "hasattr(model, 'ds_tensor')"),
        ("models/generation.py", "model.tokenizer._pad"),  # as an attribute of ours is called
        ("models/generation.py", "trainer.accelerator._dataloaders"),  # as a function of ours
    ],
)
def test_an_attribute_that_is_not_listed_is_found(files, file, line):
    planted = files | {file: f"{files[file].rstrip()}\n\n    def planted(self, trainer, model):\n        {line}\n"}
    if not files[file].rstrip().splitlines()[-1].startswith(" " * 8):
        planted[file] = f"{files[file]}\n\ndef planted(trainer, model):\n    {line}\n"
    found = unlisted_attributes(planted, HOOKS)
    if line == "self._past":  # nobody's
        assert not found
    else:
        [message] = found
        assert message.startswith(file) and "is not in HOOKS" in message


# ---- With what we call it ----


def test_all_that_we_pass_is_listed(files):
    nothing(unlisted_parameters(files, HOOKS))


def test_a_parameter_that_is_not_listed_is_found(files):
    planted = files["models/loading.py"] + "\n\ndef planted():\n    create_model_from_path('name', Any, dtype=1)\n"
    found = unlisted_parameters(files | {"models/loading.py": planted}, HOOKS)
    assert [message.split()[2] for message in found] == ["dtype,"]


def test_no_hook_is_left_over(files):
    """Every name in HOOKS is somewhere in our code."""
    used = set()
    for file, text in files.items():
        if file == "_trl.py":  # but for what is imported there for others
            text = text[text.index("__all__ = ") :].partition("HOOKS = (")[0] + "suppress_experimental_warning"
        for node in ast.walk(parsed(text)):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                used.add(node.name)
            elif isinstance(node, ast.Name):
                used.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(node.value)
    used |= {name for alias, hooked in ALIASES.items() if alias in used for name in hooked.split(".")}
    assert not [hook.name for hook in HOOKS if hook.name.split(".")[-1] not in used]
