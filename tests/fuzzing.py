"""What is fuzzed: bytes of a stranger in the place of one file, and what may become of them.

`python -m tests.fuzz` (atheris, guided by coverage) and tests/test_fuzz.py (hypothesis, and every file in
tests/crashes) feed the same functions.
"""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr
from pathlib import Path
from random import Random
from typing import Any, ClassVar
from unittest import mock

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from experiments.harness import corpus, experiment, running, writing
from experiments.harness.corpus import read_texts
from experiments.harness.ranks import Ranks
from experiments.harness.table import Tables, by_text
from minigpt import GPT2, Block, CheckpointError, GPT2Config, Sweep, Tokenizer, cli, sweep
from minigpt.checkpoint import INDEX, WEIGHTS
from tests.blocks import Rotary

CRASHES = Path(__file__).parent / "crashes"
SHAPE = GPT2Config(vocab_size=3, n_positions=2, n_embd=2, n_head=1, n_layer=1)
SHARD = "model-00001-of-00001.safetensors"


class WrongError(AssertionError):
    """Bytes were taken for something that they are not, or refused without a sentence."""


class Loader:
    """A small checkpoint, one file of which is replaced; the first byte says which, and how."""

    def __init__(self, folder: Path, block: type[Block] = Block) -> None:
        self.folder, self.block = folder, block
        with torch.random.fork_rng():
            torch.manual_seed(0)
            GPT2(SHAPE, block).save_pretrained(folder)
        self.whole = {name: (folder / name).read_bytes() for name in ("config.json", WEIGHTS)}
        length = int.from_bytes(self.whole[WEIGHTS][:8], "little")
        self.header, self.body = self.whole[WEIGHTS][8 : 8 + length], self.whole[WEIGHTS][8 + length :]
        shutil.copyfile(folder / WEIGHTS, folder / SHARD)

    def seeds(self) -> list[bytes]:
        """Valid files, from which a fuzzer starts."""
        index = json.dumps({"weight_map": {"wte.weight": SHARD}}).encode()
        return [b"\0" + self.whole["config.json"], b"\1" + self.header, b"\2" + self.whole[WEIGHTS], b"\3" + index]

    def __call__(self, data: bytes) -> bool:
        """Load with these bytes in a file's place; whether they were taken. Raises WrongError where that is wrong."""
        kind, rest = data[:1], data[1:]
        name = ("config.json", WEIGHTS, WEIGHTS, INDEX)[(kind[0] if kind else 0) % 4]
        content = len(rest).to_bytes(8, "little") + rest + self.body if kind and kind[0] % 4 == 1 else rest
        self._put(name, content)
        if name == INDEX:
            (self.folder / WEIGHTS).unlink()
        try:
            model = GPT2.from_pretrained(self.folder, block=self.block)
        except CheckpointError as error:
            _check_sentence(str(error))
            return False
        finally:
            (self.folder / INDEX).unlink(missing_ok=True)
            for whole in self.whole:
                if whole == name or name == INDEX:
                    self._put(whole, self.whole[whole])
        if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
            raise WrongError("a value that is not finite was loaded")
        return True

    def _put(self, name: str, content: bytes) -> None:
        """A new file in the place of the old one, from which a model may still be mapped."""
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).write_bytes(content)


class Texts:
    """A file of texts, of the kind that the first byte says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def seeds(self) -> list[bytes]:
        """Valid files, from which a fuzzer starts."""
        return [b'\0{"text": "a"}\n{"text": "b\\u00e9"}\n', b'\1text,id\na,1\n"b ""c""\nd",2\n', b"\2one\r\ntwo\n"]

    def __call__(self, data: bytes) -> bool:
        """Read these bytes as texts; whether they were taken. Raises WrongError when a text cannot be encoded."""
        path = self.folder / ("texts.jsonl", "texts.csv", "texts.txt")[(data[0] if data else 0) % 3]
        path.write_bytes(data[1:])
        try:
            texts = list(read_texts(path, "text"))
        except ValueError as error:
            _check_sentence(str(error))
            return False
        if not all(isinstance(text, str) for text in texts):
            raise WrongError("a text is no string")
        return True


class Tiny(experiment.Experiment[Sweep]):
    """A question that takes milliseconds; one of its numbers is defined in some windows only."""

    name, question = "tiny", "What becomes of a change?"

    def run(self, model: GPT2, ids: Sequence[Sequence[int]], alone: bool) -> Sweep:
        return sweep(model, ids, (0,), (0.5,))

    def measure(self, model: GPT2, raw: Sweep) -> Tables:
        change = raw.frobenius()[0, 0].T
        even = raw.lengths.double().where(raw.lengths % 2 == 0, torch.nan)
        return {
            "change": by_text(change, depth=range(change.shape[1])),
            "even length": by_text(even[:, None], which=["length"]),
        }


def letters() -> Tokenizer:
    """A token for every byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend)


class Corpus:
    """A corpus run of a small random model, in this process, without what takes most of its time.

    Some of its numbers are rightly undefined.
    """

    quick: ClassVar[dict[str, Any]] = {
        "experiments.harness.corpus.RESAMPLES": 50,
        "experiments.harness.writing._draw": lambda *_: None,
        "experiments.harness.running.code_digest": lambda *_: "code",
        "experiments.harness.running.versions": dict,
        "experiments.harness.writing.versions": dict,
        "minigpt.files.os.fsync": lambda _: None,
    }

    def __init__(self, home: Path, windows: int = 40) -> None:
        self.home, self.output, self.tokenizer = home, home / "out", letters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = GPT2(GPT2Config(vocab_size=256, n_positions=8, n_embd=4, n_head=1, n_layer=2)).eval()
        lines = [f"{number * 7919 % 10007}"[: 3 + number % 3] + "abc" for number in range(windows)]
        (home / "texts.txt").write_text("\n".join(lines) + "\n")
        assert self.run() == (0, "")
        self.whole = contents(self.output)

    def restore(self, output: Path | None = None) -> None:
        """Nothing but the files of the first run, in the output folder or elsewhere."""
        output = output or self.output
        shutil.rmtree(output, ignore_errors=True)
        for name, content in self.whole.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_bytes(content)

    def run(self, overwrite: bool = False) -> tuple[int, str]:
        """The exit code and what was said on standard error."""
        said = io.StringIO()
        with redirect_stderr(said), ExitStack() as patched:
            for name, value in self.quick.items():
                patched.enter_context(mock.patch(name, value))
            try:
                cli.run(lambda: self._work(overwrite))
            except SystemExit as stopped:
                return int(stopped.code or 0), said.getvalue()
        return 0, said.getvalue()

    def _work(self, overwrite: bool) -> None:
        texts = corpus.Texts.of(self.home / "texts.txt", "text", 8, None, 3)
        asked = experiment.Settings(model="tiny", prompt=None, parity=False, texts=texts)
        with ExitStack() as held:
            study = running.run_over_corpus(
                Tiny(asked), self.model, self.tokenizer, self.output, Ranks(), held, overwrite
            )
            assert study is not None
            writing.write(Tiny(asked), study, self.output)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; of a link, where it leads."""
    return {
        str(path.relative_to(folder)): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


class Resume:
    """An output folder that was damaged, and the same command again: the right numbers, or a sentence.

    The first byte says whether --overwrite is given; every three bytes after it are a damage, a file and a seed.
    """

    def __init__(self, folder: Path) -> None:
        self.corpus, self.outside = Corpus(folder), folder / "outside"
        self.whole = self.corpus.whole
        self.names = sorted(self.whole)

    def seeds(self) -> list[bytes]:
        """Every damage to every file."""
        return [
            bytes([damage + file, damage, file, damage + file])
            for damage in range(len(self.damages))
            for file in range(len(self.names))
        ]

    def __call__(self, data: bytes) -> bool:
        """Damage, run again; whether it ended well. Raises WrongError for wrong numbers and for what was touched."""
        self._restore()
        self.strangers = set[Path]()
        for damage, file, seed in zip(data[1::3], data[2::3], data[3::3], strict=False):
            path = self.corpus.output / self.names[file % len(self.names)]
            try:
                self.damages[damage % len(self.damages)](self, path, Random(seed))
            except (OSError, ValueError, LookupError, SafetensorError):  # of a file that an earlier damage took away
                continue
        before, strangers = contents(self.outside), self._of_strangers()
        code, said = self.corpus.run(overwrite=bool(data and data[0] % 2))
        if contents(self.outside) != before:
            raise WrongError("a file outside the output folder was touched")
        if self._of_strangers() != strangers:
            raise WrongError(f"a stranger's file was touched: {strangers}")
        self._check(code, said)
        return code == 0

    def _restore(self) -> None:
        for folder in (self.corpus.output, self.outside):
            self.corpus.restore(folder)
        (self.outside / "windows" / ".hidden").write_bytes(b"mine")
        (self.outside / "windows" / "0000001.safetensors").unlink()  # who follows a link there writes it

    def _of_strangers(self) -> list[Path]:
        return sorted(path for path in self.strangers if path.is_file() and path.read_bytes() == b"mine")

    def _check(self, code: int, said: str) -> None:
        *warnings, last = said.splitlines() or [""]
        warnings = warnings if code else [*warnings, last]
        if any(line and not line.startswith("Warning: ") for line in warnings):
            raise WrongError(f"more than a sentence: {said[:2000]}")
        if code:
            _check_sentence(last)
            if code not in (1, 2) or not last.startswith(("Error: ", "Check failed: ")):
                raise WrongError(f"no sentence: {said[:2000]}")
        there = contents(self.corpus.output)
        if code == 0 and any(there.get(name) != content for name, content in self.whole.items()):
            wrong = [name for name in self.whole if there.get(name) != self.whole[name]]
            raise WrongError(f"exit code 0, and other numbers in {wrong}")

    # Damages.

    def _flip(self, path: Path, random: Random) -> None:
        content = bytearray(path.read_bytes())
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(content)

    def _cut(self, path: Path, random: Random) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: random.randrange(len(content))])

    def _append(self, path: Path, random: Random) -> None:
        path.write_bytes(path.read_bytes() + random.randbytes(random.randrange(1, 64)))

    def _remove(self, path: Path, random: Random) -> None:
        path.unlink()

    def _copy(self, path: Path, random: Random) -> None:
        path.write_bytes(self.whole[random.choice(self.names)])

    def _link(self, path: Path, random: Random) -> None:
        path.unlink()
        home = random.choice((self.corpus.output, self.outside))
        path.symlink_to(home / random.choice([str(path.relative_to(self.corpus.output)), *self.names, "nothing"]))

    def _link_folder(self, path: Path, random: Random) -> None:
        links = [(name, to) for name in ("windows", ".lock", ".writing.abcdefgh") for to in ("windows", "summary.json")]
        name, to = links[self.names.index(str(path.relative_to(self.corpus.output)))]
        folder = self.corpus.output / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.symlink_to(self.outside / to)

    def _folder(self, path: Path, random: Random) -> None:
        path.unlink()
        path.mkdir()

    def _numbers(self, path: Path, random: Random) -> None:
        """With the metadata of before: only the numbers are others."""
        content = path.read_bytes()
        about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        tensors = load(content)
        name, (row, column) = random.choice(sorted(tensors)), (random.randrange(8), 0)
        values = tensors[name].clone()
        changes: list[Callable[[], torch.Tensor]] = [
            lambda: values[:5],
            lambda: values[:0],
            lambda: torch.cat([values, values]),
            lambda: values.bool(),
            lambda: values.nan_to_num().long(),
            lambda: values.float(),
            lambda: values * 10,
            lambda: values.index_put((torch.tensor(row), torch.tensor(column)), torch.tensor(torch.nan).double()),
            lambda: values.nan_to_num(),
            lambda: torch.cat([values, values], 1),
            lambda: values[:, :-1],
            lambda: values.flip(0),
            lambda: values.flatten(),
        ]
        tensors[name] = random.choice(changes)().contiguous()
        if random.random() < 0.1:
            tensors["more"] = tensors.pop(name)
        path.write_bytes(save(tensors, about))

    def _value(self, path: Path, random: Random) -> None:
        """In the JSON of a summary, of the settings, or of a shard's header."""
        content = path.read_bytes()
        start = 8 if path.suffix == ".safetensors" else 0
        parsed, end = json.JSONDecoder().raw_decode(content[start:].decode("latin-1"))
        for _ in range(random.choice((1, 1, 3))):
            inner = parsed
            while isinstance(inner, dict | list) and inner:
                keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
                container, key = inner, random.choice(keys)
                inner = inner[key]
                if random.random() < 0.3:
                    break
            container[key] = random.choice(
                (None, True, -1, 0, 10**400, 1.5, "", "\ud800", "../x", [], {}, [[[]]], {"a": 1})
            )
        header = json.dumps(parsed).encode()
        length = len(header).to_bytes(8, "little") if start else b""
        path.write_bytes(length + header + content[start:][end:])

    def _stranger(self, path: Path, random: Random) -> None:
        """Files of somebody else, and remains of a write of ours that was killed."""
        name = random.choice(
            (
                "notes.txt",
                "tiny_mine.png",
                ".gitignore",
                "windows/.gitignore",
                "windows/notes.txt",
                "windows/.0000001.safetensors.swp",
                "windows/0000001.safetensors.bak",
                ".writing.notes",
            )
        )
        ours = self.corpus.output / random.choice(
            ("windows/.0000001.safetensors.writing-host-1-4-ab_cd123/0000001.safetensors", ".writing.ab_cd123/tiny.csv")
        )
        for file in (self.corpus.output / name, ours):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"mine")
        self.strangers.add(self.corpus.output / name)

    def _killed(self, path: Path, random: Random) -> None:
        """As if the run had been killed before its results were there."""
        for name in ("summary.json", "tiny.csv", random.choice(self.names)):
            (self.corpus.output / name).unlink(missing_ok=True)

    damages = (
        _flip,
        _cut,
        _append,
        _remove,
        _copy,
        _link,
        _link_folder,
        _folder,
        _numbers,
        _value,
        _stranger,
        _killed,
    )


def _check_sentence(said: str) -> None:
    if len(said) > 10_000 or not said.strip() or any(not (letter.isprintable() or letter == "\n") for letter in said):
        raise WrongError(f"not a sentence for a terminal: {said[:200]!r}")


TARGETS: dict[str, Callable[[Path], Loader | Texts | Resume]] = {
    "loader": Loader,
    "rotary": lambda folder: Loader(folder, Rotary),
    "texts": Texts,
    "resume": Resume,
}
