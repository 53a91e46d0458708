"""What other packages declare in their source files, read without importing them.

TrainingArguments brings torch, peft and bitsandbytes with it, which takes seconds; its fields are in its file. Of a
class only its fields and constants are read, never a method. What a file says in a form that is not known here is
`Unread`: it stands for any type, and nothing may be concluded from it.
"""

import ast
import builtins
import sys
from collections.abc import Iterable, Iterator
from enum import Enum
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class _Absorbing(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return cls


class Unread(metaclass=_Absorbing):
    """Takes the place of what could not be read: a type that accepts all, choices that hold all, an empty default."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __contains__(self, _: Any) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def package_folder(package: str) -> Path:
    """Where an installed package lies; ImportError where it does not."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"no package {package} is installed")
    return Path(next(iter(spec.submodule_search_locations)))


def source_file(module: str) -> Path:
    """The file of a module, given by its dotted name, whether it exists or not."""
    package, *rest = module.split(".")
    path = package_folder(package).joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")


@cache
def source(module: str) -> ast.Module:
    """The module's source, parsed."""
    return ast.parse(source_file(module).read_text(encoding="utf-8"))


def declared_class(module: str, name: str) -> type:
    """The class with its bases as far as they are declared likewise, made of its fields and constants.

    `_assigned` names the attributes that its methods, or those of its bases, set on `self`.
    """
    home, node = _definition(module, name)
    if not isinstance(node, ast.ClassDef):
        raise LookupError(f"{module} declares no class {name}")
    bases = [declared_class(home, base.id) for base in node.bases if isinstance(base, ast.Name)]
    made = _made(home, node, bases)
    of_bases = [getattr(base, "_assigned") for base in bases]  # noqa: B009 (no type declares it)
    setattr(made, "_assigned", frozenset(_assigned(node)).union(*of_bases))  # noqa: B010 (likewise)
    return made


def calls_of(module: str, method: str) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """What a module calls a method of this name with, in any function: literals and names, else Unread."""
    for node in ast.walk(source(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
            keywords = {each.arg: _simple(module, each.value) for each in node.keywords if each.arg is not None}
            yield [_simple(module, each) for each in node.args], keywords


def parameters(module: str, function: str) -> list[str]:
    """The names of a function's parameters."""
    _, node = _definition(module, function)
    if not isinstance(node, ast.FunctionDef):
        raise LookupError(f"{module} declares no function {function}")
    return [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def names_in(module: str, dictionary: str) -> dict[str, str]:
    """Key -> the name that is its value, of a dictionary of names."""
    _, node = _definition(module, dictionary)
    pairs = zip(node.keys, node.values, strict=True)
    return {key.value: value.id for key, value in pairs}


def _definition(module: str, name: str) -> tuple[str, Any]:
    """Where a name of a module is defined, and the statement that does; the value itself, without a module.

    Imports are followed to their end, those of the standard library by importing from it.
    """
    for node in _statements(source(module).body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(
            isinstance(each, ast.Name) and each.id == name for each in node.targets
        ):
            return module, node.value
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            return module, node.value
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _imported(module, node, alias.name)
    return "", getattr(builtins, name, Unread)


def _imported(module: str, node: ast.Import | ast.ImportFrom, name: str) -> tuple[str, Any]:
    target = name if isinstance(node, ast.Import) else _target(module, node)
    if target.split(".")[0] in sys.stdlib_module_names:
        found = import_module(target)
        return "", found if isinstance(node, ast.Import) else getattr(found, name)
    if isinstance(node, ast.Import) or not source_file(target).is_file():
        return "", Unread
    return _definition(target, name)


def _target(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of the module that is imported from."""
    if not node.level:
        return node.module or ""
    package = module.split(".")
    if source_file(module).name != "__init__.py":
        package.pop()
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *filter(None, [node.module])])


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module, also behind `if` and `try`: first what is there with everything installed."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])
        else:
            yield node


def _value(module: str, name: str) -> Any:
    """What a name means in a module: enumerations and plain values, else Unread."""
    home, node = _definition(module, name)
    if not home:
        return node
    if isinstance(node, ast.ClassDef):
        bases = [_value(home, base.id) for base in node.bases if isinstance(base, ast.Name)]
        return _made(home, node, bases) if any(issubclass(base, Enum) for base in bases) else Unread
    return _simple(home, node) if isinstance(node, ast.expr) else Unread


def _simple(module: str, node: ast.expr) -> Any:
    """A literal, or what a name means."""
    if isinstance(node, ast.Name):
        return _value(module, node.id)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return Unread


def _made(module: str, node: ast.ClassDef, bases: list[type]) -> type:
    """The class with its fields and constants, without its methods."""
    body: list[ast.stmt] = [each for each in node.body if isinstance(each, ast.Assign | ast.AnnAssign)] or [ast.Pass()]
    made = ast.ClassDef(node.name, node.bases, [], body, node.decorator_list)
    tree = ast.fix_missing_locations(ast.Module([made], []))
    named = [each.id for each in node.bases if isinstance(each, ast.Name)]
    known: dict[str, Any] = dict(zip(named, bases, strict=True))
    names = {each.id for each in ast.walk(tree) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)}
    own = {each.id for each in ast.walk(tree) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    known.update({name: _value(module, name) for name in names - own - known.keys()})
    space = {**known, "__name__": module}
    exec(compile(tree, str(source_file(module)), "exec", dont_inherit=True), space)
    return space[node.name]


def _assigned(node: ast.ClassDef) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and isinstance(each.value, ast.Name):
            yield each.attr
