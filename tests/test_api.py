"""The public API is the recorded one: tests/api.txt, which `python -m tests.test_api` writes.

Recorded are the names that `minigpt` exports, with the signatures, fields, attributes, methods and properties of their
source; the options of the commands; and what the files hold that are written. Read from the source it is the same under
every version of Python. Left out: the insides of modules, docstrings, help texts, private names, the order of methods.
"""

import ast
import difflib
import inspect
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import minigpt
from minigpt import cli, parity
from minigpt.checkpoint import CONFIG, WEIGHTS
from minigpt.files import open_tensors, read_json
from tests.blocks import Rotary

RECORD = Path(__file__).with_name("api.txt")
INDENT = "    "
TELLING = {"classmethod", "contextmanager", "dataclass", "overload", "property", "staticmethod"}
"""Decorators that change how a name is used."""
SHAPE = minigpt.GPT2Config(vocab_size=5, n_positions=4, n_embd=4, n_head=2, n_layer=1)


class Bare(ast.NodeTransformer):
    """`Annotated[type, help, ...]` becomes `type`."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "Annotated" and isinstance(node.slice, ast.Tuple):
            return node.slice.elts[0]
        return self.generic_visit(node)


def is_public(name: str) -> bool:
    return not name.startswith("_") or name == "__init__"


def decorators(node: ast.FunctionDef | ast.ClassDef) -> str:
    """The telling ones, as they stand."""
    written = [ast.unparse(decorator) for decorator in node.decorator_list]
    return "".join(f"@{text} " for text in written if text.split("(")[0].split(".")[-1] in TELLING)


def function_line(node: ast.FunctionDef) -> str:
    arguments = ast.unparse(Bare().visit(node.args))
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{decorators(node)}def {node.name}({arguments}){returned}"


def attribute_names(node: ast.FunctionDef) -> Iterator[str]:
    """What `__init__` puts on `self`, in its order."""
    stored = [part for part in ast.walk(node) if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)]
    own = [part for part in stored if ast.unparse(part.value) == "self" and is_public(part.attr)]
    yield from dict.fromkeys(part.attr for part in sorted(own, key=lambda part: (part.lineno, part.col_offset)))


def class_lines(node: ast.ClassDef) -> Iterator[str]:
    """The class with its bases, then its annotated fields, attributes, methods and properties."""
    bases = ", ".join(map(ast.unparse, [*node.bases, *node.keywords]))
    yield f"{decorators(node)}class {node.name}({bases})" if bases else f"{decorators(node)}class {node.name}"
    for member in node.body:
        if isinstance(member, ast.AnnAssign) and is_public(ast.unparse(member.target)):
            yield INDENT + ast.unparse(Bare().visit(member))
    methods = [member for member in node.body if isinstance(member, ast.FunctionDef) and is_public(member.name)]
    for method in sorted(methods, key=lambda method: method.name):
        yield INDENT + function_line(method)
        if method.name == "__init__":
            yield from (f"{INDENT}self.{name}" for name in attribute_names(method))


def lines_of(source: str, name: str) -> Iterator[str]:
    """What a module's source says of one class or function."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield from class_lines(node)
        elif isinstance(node, ast.FunctionDef) and node.name == name:
            yield function_line(node)


def exported_lines() -> Iterator[str]:
    """The names of `minigpt`, by name."""
    for name in sorted(minigpt.__all__):
        value: Any = getattr(minigpt, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield from lines_of(inspect.getsource(sys.modules[value.__module__]), name)
        else:
            yield f"{name}: {type(value).__name__}"


def command_lines() -> Iterator[str]:
    """The commands, each with its arguments and options, and the defaults of these."""
    commands: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        words = ["/".join([*part.opts, *part.secondary_opts]) for part in command.params]
        defaults = ["required" if part.required else repr(part.default) for part in command.params]
        yield f"{name}: " + ", ".join(f"{word} ({default})" for word, default in zip(words, defaults, strict=True))


def tensor_lines(path: Path, name: str) -> Iterator[str]:
    """The names of a file's tensors and of its metadata."""
    with open_tensors(path) as file:
        yield f"{name}: {', '.join(sorted(file.keys()))}"
        yield f"{name}, metadata: {', '.join(sorted(file.metadata() or {}))}"


def file_lines() -> Iterator[str]:
    """What lies in the files that are written for a model of one block, of GPT-2's and of another."""
    ids = torch.tensor([[1, 2, 3]])
    with tempfile.TemporaryDirectory() as scratch:
        for block, said in ((minigpt.Block, ""), (Rotary, " of another block")):
            folder = Path(scratch) / block.__name__
            model = minigpt.GPT2(SHAPE, block)
            model.save_pretrained(folder)
            parity.save_reference(folder, ids, block)
            yield f"{CONFIG}{said}: {', '.join(sorted(read_json(folder / CONFIG)))}"
            yield from tensor_lines(folder / WEIGHTS, WEIGHTS + said)
            yield from tensor_lines(folder / parity.REFERENCE, parity.REFERENCE + said)
        path = Path(scratch) / "sweep.safetensors"
        minigpt.sweep(model, ids, [0], [0.5], predictions=True).save(path)
        yield from tensor_lines(path, path.name)


def public_api() -> str:
    """The whole record."""
    parts = {"from minigpt import": exported_lines, "the command minigpt": command_lines, "files": file_lines}
    return "\n".join(f"{name}\n" + "".join(f"{INDENT}{line}\n" for line in lines()) for name, lines in parts.items())


def located(record: str) -> Iterator[str]:
    """Every line after the part and the class that it stands in."""
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


SAMPLE = '''
@dataclass(frozen=True)
class Found(Base):
    """A thing."""
    size: int = 3  # tokens
    def __init__(self, width: int) -> None:
        self.norm: Norm = Norm(width)
        self._cache = {}
    def grow(self, by: Annotated[int, Option(help="tokens")] = 1) -> "Found": ...
    @property
    def half(self) -> float: ...

@torch.no_grad()
def find(name: str, *, exact: bool = False) -> Found: ...
'''


def sample_lines(source: str) -> list[str]:
    return [*lines_of(source, "Found"), *lines_of(source, "find")]


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
        ("-> float", "-> int"),
        ("*, exact", "exact"),
        ("def find", "def look"),
    ],
)
def test_a_changed_api_is_seen(old: str, new: str) -> None:
    assert old in SAMPLE
    assert sample_lines(SAMPLE) != sample_lines(SAMPLE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("A thing", "Another thing"),
        ("# tokens", "# bytes"),
        ('help="tokens"', 'help="bytes"'),
        ("@torch.no_grad()", ""),
        ("self._cache", "self._store"),
        ("(self, by:", "(self,\n            by:"),
    ],
)
def test_what_is_not_the_api_may_change(old: str, new: str) -> None:
    assert old in SAMPLE
    assert sample_lines(SAMPLE) == sample_lines(SAMPLE.replace(old, new))


def test_a_change_is_told_with_its_class() -> None:
    recorded = "from minigpt import\n    class Found(NamedTuple)\n        commit: str\n"
    told = changes(recorded, recorded.replace("str", "int"))
    assert told == ["-from minigpt import: Found: commit: str", "+from minigpt import: Found: commit: int"]
    assert not changes(recorded, recorded)


if __name__ == "__main__":
    RECORD.write_text(public_api(), encoding="utf-8")
    print(f"{RECORD} is written; say in CHANGELOG.md what changed.")
