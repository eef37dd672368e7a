"""The public API is the recorded one: tests/api.txt, which `python -m tests.test_api` writes.

Recorded are the names of `minigpt` itself; of its modules every public function, class and alias of a type, with the
signatures, fields, attributes, methods and properties that stand in the source; and the commands' options. Read from
the source it is the same under every version of Python. Left out: docstrings, help texts, private names, and the order
of functions, classes and methods.
"""

import ast
import difflib
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import minigpt
from minigpt import cli

LIBRARY = Path(minigpt.__file__).parent
RECORD = Path(__file__).with_name("api.txt")
INDENT = "    "
TELLING = {"classmethod", "contextmanager", "dataclass", "overload", "property", "staticmethod"}
"""Decorators that change how a name is used."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Bare(ast.NodeTransformer):
    """`Annotated[type, help, ...]` becomes `type`."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "Annotated" and isinstance(node.slice, ast.Tuple):
            return node.slice.elts[0]
        return self.generic_visit(node)


def is_public(name: str) -> bool:
    return not name.startswith("_") or name == "__init__"


def decorators(node: Function | ast.ClassDef) -> str:
    """The telling ones, as they stand."""
    written = [ast.unparse(decorator) for decorator in node.decorator_list]
    return "".join(f"@{text} " for text in written if text.split("(")[0].split(".")[-1] in TELLING)


def function_line(node: Function) -> str:
    arguments = ast.unparse(Bare().visit(node.args))
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{decorators(node)}def {node.name}({arguments}){returned}"


def attribute_names(node: Function) -> list[str]:
    """What `__init__` puts on `self`, in its order."""
    attributes = [
        part for part in ast.walk(node) if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
    ]
    own = [part for part in attributes if ast.unparse(part.value) == "self" and is_public(part.attr)]
    return list(dict.fromkeys(part.attr for part in sorted(own, key=lambda part: (part.lineno, part.col_offset))))


def class_lines(node: ast.ClassDef) -> Iterator[str]:
    """The class with its bases, then its annotated fields, attributes, methods and properties."""
    bases = ", ".join(map(ast.unparse, [*node.bases, *node.keywords]))
    yield f"{decorators(node)}class {node.name}({bases})" if bases else f"{decorators(node)}class {node.name}"
    for member in node.body:
        if isinstance(member, ast.AnnAssign) and is_public(ast.unparse(member.target)):
            yield INDENT + ast.unparse(Bare().visit(member))
    methods = [member for member in node.body if isinstance(member, Function) and is_public(member.name)]
    for method in sorted(methods, key=lambda method: method.name):
        yield INDENT + function_line(method)
        if method.name == "__init__":
            yield from (f"{INDENT}self.{name}" for name in attribute_names(method))


def alias_of(node: ast.stmt) -> str | None:
    """The name of a type's alias, such as Site in `Site = Literal["output", "head"]`; None for anything else."""
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
        name = ast.unparse(node.targets[0])
        return None if name.isupper() else name
    return None


def module_lines(source: str) -> Iterator[str]:
    """Every public function, class and alias of a type that a module defines, by name."""
    named = [(getattr(node, "name", None) or alias_of(node), node) for node in ast.parse(source).body]
    for name, node in sorted(((name, node) for name, node in named if name), key=lambda pair: pair[0]):
        if not is_public(name):
            continue
        if isinstance(node, ast.ClassDef):
            yield from class_lines(node)
        else:
            yield function_line(node) if isinstance(node, Function) else ast.unparse(Bare().visit(node))


def exported_lines() -> Iterator[str]:
    """The names of `minigpt`, each with its kind and the module that defines it."""
    for name in sorted(minigpt.__all__):
        value: Any = getattr(minigpt, name)
        kind = "class" if inspect.isclass(value) else "function" if callable(value) else type(value).__name__
        yield f"{name}: {kind} of {value.__module__}" if kind in {"class", "function"} else f"{name}: {kind}"


def command_lines() -> Iterator[str]:
    """The commands, each with its arguments and options, and the defaults of these."""
    commands: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        words = ["/".join([*part.opts, *part.secondary_opts]) for part in command.params]
        defaults = ["required" if part.required else repr(part.default) for part in command.params]
        yield f"{name}: " + ", ".join(f"{word} ({default})" for word, default in zip(words, defaults, strict=True))


def modules() -> list[Path]:
    return sorted(path for path in LIBRARY.glob("*.py") if path.stem != "__init__")


def public_api() -> str:
    """The whole record."""
    parts = {"from minigpt import": exported_lines()}
    parts |= {f"minigpt.{path.stem}": module_lines(path.read_text(encoding="utf-8")) for path in modules()}
    parts["the command minigpt"] = command_lines()
    return "\n".join(f"{name}\n" + "".join(f"{INDENT}{line}\n" for line in lines) for name, lines in parts.items())


def located(record: str) -> Iterator[str]:
    """Every line after the names of the module and the class that it stands in."""
    above: list[str] = []
    for line in record.splitlines():
        depth = (len(line) - len(line.lstrip())) // len(INDENT)
        text = line.strip()
        yield ": ".join([*above[:depth], text])
        above = [*above[:depth], text.partition("class ")[2].partition("(")[0] or text]


def changes(recorded: str, found: str) -> list[str]:
    """The lines that went (-) and came (+)."""
    lines = difflib.unified_diff([*located(recorded)], [*located(found)], lineterm="", n=0)
    return [line for line in lines if line[0] in "+-" and line[:3] not in {"+++", "---"}]


def test_the_public_api_is_the_recorded_one() -> None:
    found = changes(RECORD.read_text(encoding="utf-8"), public_api())
    if found:
        pytest.fail(
            "The public API is not the one that tests/api.txt records:\n\n"
            + "\n".join(found)
            + "\n\nIf this was not meant, take it back: others' code may depend on it. If it was, write the record "
            "again with `python -m tests.test_api`, commit it, and say in CHANGELOG.md what changed.",
            pytrace=False,
        )


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_every_recorded_name_is_there_when_the_module_is_imported(path: Path) -> None:
    module = importlib.import_module(f"minigpt.{path.stem}")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | Function) and is_public(node.name):
            assert getattr(module, node.name).__module__ == module.__name__


SAMPLE = '''
@dataclass(frozen=True)
class Found(Base):
    """A thing."""
    size: int = 3  # tokens
    def grow(self, by: Annotated[int, Option(help="tokens")] = 1) -> "Found": ...
    @property
    def half(self) -> float: ...

class Model(Module):
    def __init__(self, width: int) -> None:
        self.norm: Norm = Norm(width)
        self._cache = {}

Site = Literal["output", "head"]
@torch.no_grad()
def find(name: str, *, exact: bool = False) -> Found: ...
def _look(): ...
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("frozen=True", "frozen=False"),
        ("Found(Base)", "Found(Other)"),
        ("size: int = 3", "size: int = 4"),
        ("size: int", "length: int"),
        ("by: Annotated[int,", "by: Annotated[float,"),
        ("= 1)", "= 2)"),
        ("@property", ""),
        ("self.norm", "self.final_norm"),
        ('"head"]', '"mlp"]'),
        ("-> float", "-> int"),
        ("*, exact", "exact"),
        ("def find", "def look"),
        ("def find", "async def _find"),
    ],
)
def test_a_changed_api_is_seen(old: str, new: str) -> None:
    assert old in SAMPLE
    assert [*module_lines(SAMPLE)] != [*module_lines(SAMPLE.replace(old, new))]


def test_a_change_is_told_with_its_module_and_class() -> None:
    recorded = "minigpt.hub\n    class Found(NamedTuple)\n        commit: str\n"
    told = changes(recorded, recorded.replace("str", "int"))
    assert told == ["-minigpt.hub: Found: commit: str", "+minigpt.hub: Found: commit: int"]
    assert not changes(recorded, recorded)


def test_the_order_of_functions_is_not_the_api() -> None:
    functions = ["def a(): ...", "def b(): ...", "class C: ..."]
    assert [*module_lines("\n".join(functions))] == [*module_lines("\n".join(reversed(functions)))]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("A thing", "Another thing"),
        ("# tokens", "# bytes"),
        ('help="tokens"', 'help="bytes"'),
        ("@torch.no_grad()", ""),
        ("def _look(): ...", "def _see(name): ..."),
        ("self._cache", "self._store"),
        ("(self, by:", "(self,\n            by:"),
    ],
)
def test_what_is_not_the_api_may_change(old: str, new: str) -> None:
    assert old in SAMPLE
    assert [*module_lines(SAMPLE)] == [*module_lines(SAMPLE.replace(old, new))]


if __name__ == "__main__":
    RECORD.write_text(public_api(), encoding="utf-8")
    print(f"{RECORD} is written; say in CHANGELOG.md what changed.")
