"""Text <-> token ids, over the `tokenizers` library."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import tokenizers

from minigpt import hub
from minigpt.config import CheckpointError
from minigpt.files import check_regular, read_json

MOST_BYTES = 64 * 2**20
"""Of a tokenizer's file; GPT-2's has 1 to 4 MB."""


class Tokenizer:
    """GPT-2's byte-level BPE: any text can be encoded, and decodes to itself."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.backend.no_truncation()  # a file may ask for it, and would cut texts silently
        self.backend.no_padding()

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, revision: str | None = None, local_files_only: bool = False
    ) -> "Tokenizer":
        """Load tokenizer.json, or vocab.json with merges.txt, of a directory, short name or hub id.

        Raises CheckpointError when neither is there or when they are broken.
        """
        directory = hub.find(name_or_path, revision, local_files_only, hub.TOKENIZER_FILES).directory
        whole, vocab, merges = (directory / name for name in hub.TOKENIZER_FILES)
        with _refusing(CheckpointError, f"The tokenizer in {directory} is broken", "Download it again."):
            if whole.exists():
                _check(read_json(whole, MOST_BYTES))  # within bounds; the backend would read and recurse without any
                return cls(tokenizers.Tokenizer.from_file(str(whole)))
            if vocab.exists() and merges.exists():
                read_json(vocab, MOST_BYTES)
                check_regular(merges, MOST_BYTES)
                return cls(_from_vocabulary(vocab, merges))
        raise CheckpointError(f"{directory} has no tokenizer.json and no vocab.json with merges.txt.")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written out in it, such as <|endoftext|>, become one id.

        Raises ValueError for a text that is not valid Unicode, and for one that these ids would not give back:
        not every tokenizer.json keeps every letter.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"The text is not valid Unicode at character {error.start}: {error.reason}.") from None
        with _refusing(ValueError, "This tokenizer cannot encode the text", "Take the one that the model came with."):
            ids = self.backend.encode(text, add_special_tokens=False).ids
        if (again := self.decode(ids)) != text:
            at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, again, strict=False)))
            raise ValueError(
                f"This tokenizer loses something at character {at}: {text[at : at + 20]!r} becomes "
                f"{again[at : at + 20]!r}; take the one that the model came with."
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        with _refusing(ValueError, "This tokenizer cannot decode the ids", "Take the one that the model came with."):
            return self.backend.decode(ids, skip_special_tokens=False)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come; a character spread over several tokens waits until it is whole."""
        read, shown = list[int](), 0
        for token in ids:
            read.append(token)
            text = self.decode(read)
            if not text.endswith("\ufffd"):
                yield text[shown:]
                shown = len(text)
        yield self.decode(read)[shown:]

    def tokens(self, ids: list[int]) -> list[str]:
        """The text of each id by itself."""
        return [self.decode([token]) for token in ids]


@contextmanager
def _refusing(kind: type[ValueError], what: str, then: str) -> Iterator[None]:
    """Turn whatever goes wrong into one kind of error: the backend raises bare Exception, and its panics are none."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise kind(f"{what}: {error}. {then}") from None


def _check(parsed: Any) -> None:
    """Raise ValueError for what GPT-2's byte-level BPE has not, and what harms.

    A normalizer changes the text, and can make it any number of times longer; dropout draws other ids every time; a
    prefix inside words makes the backend panic.
    """
    model = parsed.get("model") if isinstance(parsed, dict) else None
    if isinstance(model, dict) and (model.get("continuing_subword_prefix") or model.get("dropout")):
        raise ValueError("it has dropout, or a prefix inside words, which GPT-2's has not")
    if isinstance(parsed, dict) and parsed.get("normalizer"):
        raise ValueError("it changes texts before it reads them (normalizer), which GPT-2's does not")


def _from_vocabulary(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if backend.token_to_id("<|endoftext|>") is not None:
        backend.add_special_tokens(["<|endoftext|>"])
    return backend
