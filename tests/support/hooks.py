"""What our files use of other packages, and which of it the table of hooks lacks."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from trl import SFTTrainer

from amid_trl import AMiDTrainer
from amid_trl._trl import Hook
from amid_trl.comparison.run import ComparedTrainer


PACKAGE = Path(__file__).parents[2] / "amid_trl"

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

# Private names of others than these libraries: argparse's, those of a NamedTuple, which are documented, and ours on a
# class that we have made.
OF_OTHERS = {
    *("_option_string_actions", "_actions", "_get_formatter", "_get_help_string"),
    *("_asdict", "_replace"),
    "_assigned",
}

OURS = (AMiDTrainer, ComparedTrainer)

# Under which name we call what HOOKS calls otherwise.
ALIASES = {"forward_redirection": "_ForwardRedirection.__call__", "vllm_engine": "VLLMGeneration"}

RECEIVERS = {"self", "super()", "trainer", "SFTTrainer", "hf_deepspeed", "inner", "self._engine"}

DOTTED = re.compile(rf"({'|'.join(LIBRARIES)})(\.\w+)+")

REFLECTING = {"getattr", "hasattr", "setattr"}


Files = dict[str, str]


parsed = cache(ast.parse)


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
