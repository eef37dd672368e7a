"""A digest of the code that computes an experiment's numbers: results of other code are not taken up again.

What counts is what Python runs: comments, docstrings and the layout of a file do not. Every module of the library and
of the experiments counts, but those that only draw, show or time. So do the experiment's class and the classes of the
model's modules, wherever they were defined: their file, and the bytecode of their functions as they are now, so that
a class of a notebook counts, and one that was patched.
"""

import ast
import dis
import functools
import hashlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any

from torch import nn

import minigpt

EXPERIMENTS = Path(__file__).resolve().parents[1]
PACKAGES = (Path(minigpt.__file__).resolve().parent, EXPERIMENTS)
LEFT_OUT = tuple(EXPERIMENTS / name for name in ("page", "tour", "tools"))
NOT_OURS = ("torch", "builtins", "abc", "typing")
"""Packages whose versions a summary names, or that come with Python."""


def code_digest(experiment: object, model: nn.Module) -> str:
    """The sha256, in hexadecimal, of all code that decides the numbers of an experiment on a model."""
    classes = _classes_of(experiment, model)
    digest = hashlib.sha256(_of_packages().encode())
    for path in dict.fromkeys(path for kind in classes for path in _files_of(kind)):
        digest.update(_of_file(path).encode())
    for kind in classes:
        digest.update("\n".join([kind.__qualname__, *_of_class(kind)]).encode())
    for number, module in enumerate(model.modules()):  # a method that one module alone was given
        for name, function in sorted(vars(module).items()):
            if inspect.isroutine(function):
                digest.update("\n".join([f"{number} {name}", *_of_function(function)]).encode())
    return digest.hexdigest()


@functools.cache  # what this process has imported stays as it is
def _of_packages() -> str:
    paths = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
    counted = [path for path in paths if not any(path.is_relative_to(folder) for folder in LEFT_OUT)]
    return "\n".join(f"{path.parent.name}/{path.name} {_of_file(path)}" for path in counted)


class _WithoutProse(ast.NodeTransformer):
    """A string that stands by itself does nothing."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """ast calls it for every expression that is a statement."""
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)


def _of_file(path: Path) -> str:
    return ast.dump(_WithoutProse().visit(ast.parse(path.read_bytes())))


def _classes_of(experiment: object, model: nn.Module) -> list[type]:
    """The classes of an experiment and of a model's modules with those they derive from, each once."""
    kinds = [type(experiment), *map(type, model.modules())]
    found = dict.fromkeys(kind for concrete in kinds for kind in concrete.__mro__)
    return [kind for kind in found if kind.__module__.partition(".")[0] not in NOT_OURS]


def _files_of(kind: type) -> Iterator[Path]:
    """The file that defines a class, where it has one and is not counted already."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    path = Path(file).resolve() if file else None
    if path and path.suffix == ".py" and not any(path.is_relative_to(package) for package in PACKAGES):
        yield path


def _of_class(kind: type) -> Iterator[str]:
    for name, member in sorted(vars(kind).items()):
        parts = (member.fget, member.fset) if isinstance(member, property) else (member,)
        for part in parts:
            function = getattr(part, "__func__", part)  # of a class method, or a static one
            if inspect.isroutine(function):
                yield name
                yield from _of_function(function)


def _of_function(function: Any) -> Iterator[str]:
    """What a function does, and the numbers that it was given when it was made."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    if code := getattr(function, "__code__", None):
        yield _of_code(code)
        yield _of_constant((*_closed_over(function), function.__defaults__, function.__kwdefaults__))


def _closed_over(function: Any) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a name that has no value yet
            yield cell.cell_contents


def _of_code(code: CodeType) -> str:
    """Its instructions, with names and constants in the place of their numbers: a docstring is none of them."""
    return repr([(step.opname, _of_constant(step.argval)) for step in dis.get_instructions(code)])


def _of_constant(value: Any) -> str:
    """A constant in words that every process says alike: without addresses, and sets in order."""
    if isinstance(value, CodeType):
        return _of_code(value)
    if isinstance(value, tuple | list):
        return repr([_of_constant(item) for item in value])
    if isinstance(value, dict):
        return repr([(_of_constant(key), _of_constant(item)) for key, item in value.items()])
    if isinstance(value, set | frozenset):
        return repr(sorted(_of_constant(item) for item in value))
    if callable(value) and hasattr(value, "__code__"):
        return _of_code(value.__code__)
    return repr(value) if isinstance(value, int | float | complex | str | bytes | None) else type(value).__qualname__
