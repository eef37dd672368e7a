"""Text <-> token ids, over the `tokenizers` library."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

from minigpt import hub
from minigpt.config import CheckpointError


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
        try:
            if whole.is_file():
                return cls(tokenizers.Tokenizer.from_file(str(whole)))
            if vocab.is_file() and merges.is_file():
                return cls(_from_vocabulary(vocab, merges))
        except Exception as error:  # the backend raises bare Exception for every kind of broken file
            raise CheckpointError(f"The tokenizer in {directory} is broken: {error}. Download it again.") from None
        raise CheckpointError(f"{directory} has no tokenizer.json and no vocab.json with merges.txt.")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written out in it, such as <|endoftext|>, become one id.

        Raises ValueError for a text that is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"The text is not valid Unicode at character {error.start}: {error.reason}.") from None
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""
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


def _from_vocabulary(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if backend.token_to_id("<|endoftext|>") is not None:
        backend.add_special_tokens(["<|endoftext|>"])
    return backend
