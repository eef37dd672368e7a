"""A digest of the code that computes an experiment's numbers: results of other code are not taken up again.

What counts is what Python runs: comments, docstrings and the layout of a file do not. Every module of the library and
of the experiments counts, but those that only draw, show or time. So do the experiment's class and the classes of the
model's modules, wherever they were defined: their file, and their attributes and the bytecode of their functions as
they are now, so that a class of a notebook counts, and one that was patched. Of a user's functions, so do the
functions, classes and constants that they name, in whatever module of the user's.
"""

import ast
import dis
import functools
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import nn

import minigpt
from minigpt.model import kept_beside

EXPERIMENTS = Path(__file__).resolve().parents[1]
PACKAGES = (Path(minigpt.__file__).resolve().parent, EXPERIMENTS)
LEFT_OUT = tuple(EXPERIMENTS / name for name in ("page", "tour", "tools"))
NOT_OURS = ("torch", "builtins", "abc", "typing")
"""Packages whose versions a summary names, or that come with Python."""
LIBRARIES = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))
PLAIN = (bool, int, float, complex, str, bytes, type(None), range, torch.dtype)
"""Values that their representation says whole, and that every process says alike."""
DATA = (*PLAIN, list, tuple, dict, set, frozenset)
"""Values that a module may have been given for itself; its tensors count too."""


def code_digest(experiment: object, model: nn.Module) -> str:
    """The sha256, in hexadecimal, of all code that decides the numbers of an experiment on a model."""
    classes, seen = _classes_of(experiment, model), set[int]()
    digest = hashlib.sha256(_of_packages().encode())
    for path in dict.fromkeys(path for kind in classes for path in _files_of(kind)):
        digest.update(_of_file(path).encode())
    for kind in classes:
        digest.update("\n".join(_of(kind, seen)).encode())
    for number, module in enumerate(model.modules()):  # what one module alone was given
        for name, value in sorted(vars(module).items()):
            if inspect.isroutine(value) or (name[0] != "_" and name != "training" and isinstance(value, DATA)):
                digest.update("\n".join([f"{number} {name}", *_of(value, seen)]).encode())
    for name, tensor in kept_beside(model).items():
        digest.update("\n".join([name, *_of(tensor, seen)]).encode())
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


def _ours(module: str) -> bool:
    """Whether a module is a user's: no library, and not counted by its file already."""
    file = getattr(sys.modules.get(module), "__file__", None)
    known = (*LIBRARIES, *PACKAGES)
    builtin = module.partition(".")[0] in (*NOT_OURS, *sys.stdlib_module_names) and module != "__main__"
    return not builtin and not (file and any(Path(file).resolve().is_relative_to(folder) for folder in known))


def _of(value: Any, seen: set[int]) -> Iterator[str]:
    """A value in words that every process says alike: without addresses, sets in order, and each thing once."""
    if isinstance(value, PLAIN):
        yield repr(value)
    elif isinstance(value, CodeType):
        yield from _of_code(value, seen)
    elif isinstance(value, tuple | list):
        yield type(value).__name__
        yield from (word for item in value for word in (*_of(item, seen), ","))
    elif isinstance(value, dict):
        yield from _of(list(value.items()), seen)
    elif isinstance(value, set | frozenset):
        yield from sorted(" ".join(_of(item, seen)) for item in value)
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype} {list(value.shape)}"
        yield hashlib.sha256(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
    else:
        yield from _of_behaviour(value, seen)


def _of_behaviour(value: Any, seen: set[int]) -> Iterator[str]:
    """What is no plain data: classes, functions, and what is made of them."""
    if isinstance(value, type):
        yield from _of_class(value, seen)
    elif isinstance(value, property):
        yield from _of([value.fget, value.fset], seen)
    elif isinstance(value, functools.partial):
        yield from _of([value.func, value.args, value.keywords], seen)
    elif is_dataclass(value):
        yield from _of([type(value).__qualname__, *(getattr(value, field.name) for field in fields(value))], seen)
    elif code := getattr(function := inspect.unwrap(getattr(value, "__func__", value)), "__code__", None):
        yield from _of_function(function, code, seen)
    else:
        yield type(value).__qualname__


def _of_class(kind: type, seen: set[int]) -> Iterator[str]:
    """A class of a library has a name; of any other, all that it holds counts."""
    yield f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__.partition(".")[0] in NOT_OURS or id(kind) in seen:
        return
    if not (_ours(kind.__module__) or kind.__module__.partition(".")[0] in ("minigpt", "experiments")):
        return
    seen.add(id(kind))
    for base in kind.__bases__:
        yield from _of_class(base, seen)
    for name, member in sorted(vars(kind).items()):
        if not name.startswith("__") or inspect.isroutine(member):
            yield name
            yield from _of(member, seen)


def _of_function(function: Any, code: CodeType, seen: set[int]) -> Iterator[str]:
    """What a function does, the numbers that it was given when it was made, and a user's globals that it names."""
    if id(function) in seen:
        return
    seen.add(id(function))
    yield from _of_code(code, seen)
    yield from _of([*_closed_over(function), function.__defaults__, function.__kwdefaults__], seen)
    if _ours(function.__module__ or ""):
        yield from _of_names(sorted(_names_in(code)), function.__globals__, seen)


def _of_names(names: list[str], known: dict[str, Any], seen: set[int]) -> Iterator[str]:
    """What names stand for among a module's globals; of a user's module, what they stand for in that one."""
    for name in names:
        value = known.get(name)
        if isinstance(value, ModuleType):
            if _ours(value.__name__) and id(value) not in seen:
                seen.add(id(value))
                yield from _of_names(names, vars(value), seen)
        elif name in known:
            yield name
            yield from _of(value, seen)


def _names_in(code: CodeType) -> set[str]:
    inner = (_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _closed_over(function: Any) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a name that has no value yet
            yield cell.cell_contents


def _of_code(code: CodeType, seen: set[int]) -> Iterator[str]:
    """Its instructions, with names and constants in the place of their numbers: a docstring is none of them."""
    for step in dis.get_instructions(code):
        yield step.opname
        yield from _of(step.argval, seen)
