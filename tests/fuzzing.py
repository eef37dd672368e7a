"""What is fuzzed: bytes of a stranger in the place of one file, and what may become of them.

`python -m tests.fuzz` (atheris, guided by coverage) and tests/test_fuzz.py (hypothesis, and every file in
tests/crashes) feed the same functions.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from experiments.harness.corpus import read_texts
from minigpt import GPT2, Block, CheckpointError, GPT2Config
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


def _check_sentence(said: str) -> None:
    if len(said) > 10_000 or not said.strip() or any(not (letter.isprintable() or letter == "\n") for letter in said):
        raise WrongError(f"not a sentence for a terminal: {said[:200]!r}")


TARGETS: dict[str, Callable[[Path], Loader | Texts]] = {
    "loader": Loader,
    "rotary": lambda folder: Loader(folder, Rotary),
    "texts": Texts,
}
