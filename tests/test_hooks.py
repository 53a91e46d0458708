"""What we need of TRL, transformers, accelerate, PEFT and DeepSpeed beyond their promises is in HOOKS, and is there.

Half of the tests compare HOOKS with the installed versions, the other half with our own code, by walking through it.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from trl import SFTTrainer

from amid_trl import AMiDTrainer
from amid_trl._trl import HOOKS, Hook
from amid_trl.comparison.run import ComparedTrainer


PACKAGE = Path(__file__).parents[1] / "amid_trl"
LIBRARIES = ("trl", "transformers", "accelerate", "peft", "deepspeed")
# Where private names are imported, and those of DeepSpeed at all; its attributes of weights begin alike.
HOMES = {"deepspeed": "models/deepspeed.py"}
HOME, OF_WEIGHTS = "_trl.py", "ds_"
# Public is what a library's own package exports, and of its modules these: what a Trainer's documented methods return,
# and utilities in the libraries' reference. Everything else is in HOOKS, and imported in its home.
PUBLIC = {
    *("transformers.trainer_utils.EvalLoopOutput", "transformers.trainer_utils.TrainOutput"),
    *("transformers.utils.is_peft_available", "transformers.utils.is_rich_available"),
    *("accelerate.utils.align_module_device", "accelerate.utils.is_peft_model"),
}
# Public of a trainer is what its constructor takes, and what the reference of transformers' Trainer names.
PUBLIC_OF_TRAINERS = {
    *("model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", "optimizer"),
    *(
        "accelerator",
        "state",
        "model_wrapped",
        "add_callback",
        "pop_callback",
        "evaluate",
        "is_world_process_zero",
        "push_to_hub",
    ),
    *("save_model", "end"),
    # Ours. transformers' search for hyperparameters has one as well, but needs a model_init, which TRL does not take.
    "objective",
}
# Private names of others than these libraries: argparse's, and ours on a class that we have made.
OF_OTHERS = {"_option_string_actions", "_actions", "_get_formatter", "_get_help_string", "_assigned"}
OURS = (AMiDTrainer, ComparedTrainer)
# Under which name we call what HOOKS calls otherwise.
ALIASES = {"forward_redirection": "_ForwardRedirection.__call__", "vllm_engine": "VLLMGeneration"}
RECEIVERS = {"self", "super()", "trainer", "SFTTrainer", "hf_deepspeed", "inner", "self._engine"}

DOTTED = re.compile(rf"({'|'.join(LIBRARIES)})(\.\w+)+")
REFLECTING = {"getattr", "hasattr", "setattr"}

Files = dict[str, str]

parsed = cache(ast.parse)


@pytest.fixture(scope="module")
def files() -> Files:
    """The text of every file of the package."""
    found = {str(file.relative_to(PACKAGE)): file.read_text() for file in sorted(PACKAGE.rglob("*.py"))}
    assert len(found) > 50
    return found


def nothing(found: list[str]) -> None:
    assert not found, "\n".join(found)


# ---- What is installed ----


@cache
def stored_by(owner: type) -> set[str]:
    """The attributes that methods of a class set, on `self` or on another object."""
    names = set()
    for base in owner.__mro__[:-1]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # written in C
            continue
        names |= {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
    return names


@cache
def names_of_trainers() -> set[str]:
    """All that a trainer has without us, GKDTrainer left out."""
    return {*dir(SFTTrainer), *stored_by(SFTTrainer)}


def parameters_of(hook: Hook) -> list[str]:
    """In the order of the call."""
    found = hook.resolve()
    names = list(inspect.signature(found).parameters)
    return names[1:] if names[:1] == ["self"] else names


def missing(hooks: tuple[Hook, ...]) -> list[str]:
    """Hooks that are not installed, or not with the parameters that we rely on."""
    wrong = []
    for hook in hooks:
        where = f"{hook.name} ({hook.how}: {hook.why}; {installed(hook)})"
        owner, _, name = hook.name.rpartition(".")
        try:
            hook.resolve()
        except (AttributeError, ImportError) as error:
            try:
                there = name in stored_by(hook._replace(name=owner).resolve())
            except (AttributeError, ImportError):
                there = False
            if not there and not hook.optional:
                wrong.append(f"{where} is not there: {error}")
            continue
        if hook.parameters:
            there = parameters_of(hook)
            wrong += [f"{where} has no parameter {lost}, but {there}" for lost in hook.parameters if lost not in there]
    return wrong


def installed(hook: Hook) -> str:
    library = hook.name.split(".")[0]
    return f"{library} {version(library)}"


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


def methods(ours: type) -> Iterator[tuple[str, object]]:
    """What a class of ours has in front of a trainer's own; `__init__` is called, and by no one else."""
    for name, member in vars(ours).items():
        if name in names_of_trainers() and not (name.startswith("__") and name.endswith("__")):
            yield name, member


def unlisted_overrides(classes: tuple[type, ...], hooks: tuple[Hook, ...]) -> list[str]:
    """What our classes override, and which of its parameters they name, without a hook that says so."""
    by_name = {hook.name.split(".")[-1]: hook for hook in hooks if hook.how in ("overridden", "set")}
    wrong = []
    for ours in classes:
        for name, member in methods(ours):
            hook = by_name.get(name)
            if hook is None or (callable(member) and hook.how != "overridden"):
                wrong.append(f"{ours.__name__}.{name} overrides a name of TRL's trainer and is not in HOOKS as such")
            elif callable(member):
                named = {*inspect.signature(member).parameters} & {*parameters_of(hook)}
                wrong += [
                    f"{ours.__name__}.{name} takes {parameter}, which {hook.name} in HOOKS does not list"
                    for parameter in sorted(named - {*hook.parameters, "args", "kwargs"})
                ]
    return wrong


def narrow_overrides(classes: tuple[type, ...]) -> list[str]:
    """Overrides that do not take what a caller of the original may pass, by name or by position."""
    wrong = []
    for ours in classes:
        for name, member in methods(ours):
            if not callable(member):
                continue
            theirs = inspect.signature(getattr(SFTTrainer, name)).parameters.values()
            named = [p.name for p in theirs if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)][1:]
            signature = inspect.signature(member)
            by_keyword = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
            in_order = [parameter for parameter in named if parameter not in by_keyword]
            try:
                signature.bind(None, **dict.fromkeys(named))
                bound = signature.bind(None, *in_order).arguments
            except TypeError as error:
                wrong.append(f"{ours.__name__}.{name} does not take TRL's {', '.join(named)}: {error}")
                continue
            wrong += [
                f"{ours.__name__}.{name} takes {value} for {parameter}"
                for parameter, value in list(bound.items())[1:]
                if isinstance(value, str) and value != parameter
            ]
    return wrong


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


def imported(text: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of all that is imported from the libraries."""
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] in LIBRARIES)


def is_public(name: str) -> bool:
    *module, last = name.split(".")
    exported = not module or (len(module) == 1 and find_spec(name) is None)
    return not last.startswith("_") and (exported or name in PUBLIC)


def named_in_strings(text: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of what a string names in these libraries, for whoever reads or imports by name."""
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            yield node.lineno, node.value


def unlisted_imports(files: Files, hooks: tuple[Hook, ...]) -> list[str]:
    """Imports that are neither public nor in HOOKS and their home; a module is in HOOKS if names in it are."""
    listed = {hook.name for hook in hooks}
    listed |= {f"{hook.name.rpartition('.')[0]}" for hook in hooks}
    wrong = []
    for file, text in files.items():
        for line, name in imported(text):
            home = HOMES.get(name.split(".")[0])
            if is_public(name) and file == (home or file):
                continue
            if file != (home or HOME):
                wrong.append(f"{file}:{line} imports {name}, which is for {home or HOME} to do")
            elif name not in listed:
                wrong.append(f"{file}:{line} imports {name}, which is not in HOOKS")
        for line, name in named_in_strings(text) if file != HOME else ():
            if not is_public(name) and name not in listed:
                wrong.append(f"{file}:{line} names {name}, which is not in HOOKS")
    return wrong


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


def trainer_classes(tree: ast.Module) -> list[ast.ClassDef]:
    bases = {"GKDTrainer", "AMiDTrainer"}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return [node for node in classes if bases & {base.id for base in node.bases if isinstance(base, ast.Name)}]


def own_private_names(files: Files) -> set[str]:
    """Functions, and attributes of `self`, whose name begins with `_`."""
    names = set()
    for text in files.values():
        for node in ast.walk(parsed(text)):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return names


def unlisted_attributes(files: Files, hooks: tuple[Hook, ...]) -> list[str]:
    """What is private, or a trainer's without being documented, and is not in HOOKS."""
    listed = {hook.name.split(".")[-1] for hook in hooks}
    own = own_private_names(files)  # on another object than `self` the name is somebody else's
    wrong = []
    for file, text in files.items():
        tree = parsed(text)
        of_trainers = {id(node) for trainer in trainer_classes(tree) for node in ast.walk(trainer)}
        for node in ast.walk(tree):
            for line, receiver, name in attributes_of(node):
                if name.startswith(OF_WEIGHTS) and file != HOMES["deepspeed"]:
                    wrong.append(
                        f"{file}:{line} reads {name}, which is not in HOOKS for it: {HOMES['deepspeed']} does"
                    )
                if name in listed or (name.startswith("__") and name.endswith("__")):
                    continue
                receiver = ast.unparse(receiver)
                in_trainer = id(node) in of_trainers and receiver in ("self", "super()", "SFTTrainer")
                if in_trainer or receiver in ("trainer", "SFTTrainer", "GKDTrainer"):
                    unlisted = name in names_of_trainers() and name not in PUBLIC_OF_TRAINERS
                else:
                    ours = name in OF_OTHERS or (receiver == "self" and name in own)
                    unlisted = name.startswith("_") and not ours
                if unlisted:
                    wrong.append(f"{file}:{line} has {receiver}.{name}, which is not in HOOKS")
    return wrong


def attributes_of(node: ast.AST) -> Iterator[tuple[int, ast.expr, str]]:
    """(line, receiver, name) of an attribute, or of `getattr(receiver, "name")`."""
    if isinstance(node, ast.Attribute):
        yield node.lineno, node.value, node.attr
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFLECTING:
        receiver, name = node.args[:2]
        if isinstance(name, ast.Constant):
            yield node.lineno, receiver, name.value


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


def unlisted_parameters(files: Files, hooks: tuple[Hook, ...]) -> list[str]:
    """Parameters that we pass to what is hooked, and that the hook does not list."""
    by_name = {hook.name.split(".")[-1]: hook for hook in hooks if hook.how in ("called", "overridden")}
    by_name |= {alias: hook for alias, name in ALIASES.items() for hook in hooks if hook.name.endswith(f".{name}")}
    wrong = []
    for file, text in files.items():
        for node in ast.walk(parsed(text)):
            if not isinstance(node, ast.Call):
                continue
            receiver, _, name = ast.unparse(node.func).rpartition(".")
            if name not in by_name or (receiver and receiver not in RECEIVERS):
                continue
            if name == "__init__" and receiver != "SFTTrainer":
                continue
            hook = by_name[name]
            given = node.args[1:] if receiver == "SFTTrainer" else node.args  # a trainer stands first
            starred = [i for i, argument in enumerate(given) if isinstance(argument, ast.Starred)]
            by_position = parameters_of(hook)[: min([len(given), *starred])]
            passed = [*by_position, *(keyword.arg for keyword in node.keywords if keyword.arg)]
            wrong += [
                f"{file}:{node.lineno} passes {parameter}, which {hook.name} in HOOKS does not list"
                for parameter in passed
                if parameter not in hook.parameters
            ]
    return wrong


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
