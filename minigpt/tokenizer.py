"""Text <-> token ids, over the `tokenizers` library.

Of a stranger's file, only the vocabulary, the merges and the added tokens reach that library. Every other part is
GPT-2's own, and a file that asks for another one is refused.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from minigpt import hub
from minigpt.config import MOST, CheckpointError
from minigpt.files import check_regular, read_json, shown

MOST_BYTES = 32 * 2**20
"""Of a tokenizer's file, which take thirty times as many in memory; GPT-2's has 1 to 4 MB."""
MOST_LETTERS = 1024
"""Of a token: a text of a thousand is a thousand times as long. GPT-2's longest has 128."""
MOST_ADDED = 2**20
"""Letters of all added tokens; GPT-2's one has 13."""
IGNORED = {"version", "truncation", "padding", "post_processor"}
"""Parts of tokenizer.json that change no id here: texts are encoded whole, and nothing is put around them."""
THEN = "Take GPT-2's byte-level BPE, as the model came with it, or download it again."


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
        with _refusing(CheckpointError, f"The tokenizer in {directory} cannot be used", THEN):
            if whole.exists():
                return cls(_from_whole(read_json(whole, MOST_BYTES)))
            if vocab.exists() and merges.exists():
                check_regular(merges, MOST_BYTES)
                lines = merges.read_text(encoding="utf-8").split("\n")
                return cls(_from_vocabulary(read_json(vocab, MOST_BYTES), lines))
        raise CheckpointError(
            f"{directory} has no tokenizer.json and no vocab.json with merges.txt; if the model was made from another "
            "checkpoint, copy that checkpoint's tokenizer here."
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written out in it, such as <|endoftext|>, become one id.

        Raises ValueError for a text that is not valid Unicode, and for one that these ids would not give back:
        not every tokenizer.json keeps every letter.
        """
        if not isinstance(text, str):
            raise ValueError(
                f"The text is a {type(text).__name__}; expected a string. Encode one text after the other."
            )
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
        """The text of token ids, special tokens included; bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for what is no list of ids, and for ids that the tokenizer does not have.
        """
        if not isinstance(ids, list):
            raise ValueError(
                f"The ids are a {type(ids).__name__}; expected a list of numbers, such as ids[0].tolist()."
            )
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


def _from_whole(parsed: Any) -> tokenizers.Tokenizer:
    """Make what a tokenizer.json says. Raises ValueError, naming the part, unless that is GPT-2's byte-level BPE."""
    parts = _object("file", parsed)
    _expect_unset("file", parts, {*IGNORED, "model", "added_tokens", "pre_tokenizer", "decoder"})
    model, pre, decoder = (_object(name, parts.get(name)) for name in ("model", "pre_tokenizer", "decoder"))
    if pre.get("type") == "Sequence" and len(only := _list("pretokenizers", pre.get("pretokenizers"))) == 1:
        pre = _object("pre_tokenizer", only[0])
    _expect_type("model", model.get("type", "BPE"), "BPE")  # GPT-2's own file has no type there
    _expect_type("pre_tokenizer", pre.get("type"), "ByteLevel")
    _expect_type("decoder", decoder.get("type"), "ByteLevel")
    if pre.get("add_prefix_space") or not pre.get("use_regex", True):
        raise ValueError("its pre_tokenizer adds a space before a text, or cuts no words; GPT-2's does neither")
    _expect_unset("model", model, {"type", "vocab", "merges", "unk_token"})  # unk: every byte has a token
    return _byte_level_bpe(model.get("vocab"), model.get("merges"), parts.get("added_tokens") or [])


def _from_vocabulary(vocab: Any, lines: list[str]) -> tokenizers.Tokenizer:
    """Make what vocab.json and the lines of merges.txt say; <|endoftext|>, where it is there, is the special token."""
    end = _object("vocab.json", vocab).get("<|endoftext|>")
    added = [] if end is None else [{"id": end, "content": "<|endoftext|>", "special": True}]
    merges = [line.rstrip("\r") for line in lines if not line.startswith("#version")]
    return _byte_level_bpe(vocab, [merge for merge in merges if merge], added)


def _byte_level_bpe(vocab: Any, merges: Any, added: Any) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer with this vocabulary, these merges, as pairs or with a space between, and these added tokens.

    Raises ValueError where they are not what they must be.
    """
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in _list("merges", merges)]
    backend = tokenizers.Tokenizer(models.BPE(vocab=_ids(vocab), merges=[_pair(merge) for merge in pairs]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokens = {content: token for token in _list("added_tokens", added) if (content := _content(token))}
    if sum(map(len, tokens)) > MOST_ADDED:
        raise ValueError(f"its added tokens have more than {MOST_ADDED} letters together")
    ordered = sorted(tokens.items(), key=lambda item: item[1]["id"])  # the backend counts on in this order
    flags = [(content, bool(token.get("normalized")), bool(token.get("special"))) for content, token in ordered]
    backend.add_tokens([AddedToken(content, normalized=early, special=special) for content, early, special in flags])
    for content, token in ordered:
        if (found := backend.token_to_id(content)) != token["id"]:
            raise ValueError(
                f"its added token {shown(content)} has the id {token['id']}; expected {found}, the next one"
            )
    return backend


def _ids(vocab: Any) -> dict[str, int]:
    """A vocabulary. Raises ValueError unless every token has an id of its own and is no longer than one may be."""
    ids = _object("vocab", vocab)
    if any(len(token) > MOST_LETTERS for token in ids):
        raise ValueError(f"its vocab has a token of more than {MOST_LETTERS} letters")
    if not all(map(_is_id, ids.values())) or len(set(ids.values())) < len(ids):
        raise ValueError(f"its vocab gives an id twice, or one that is not a whole number from 0 to {MOST}")
    return ids


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _pair(merge: Any) -> tuple[str, str]:
    match merge:
        case [str(one), str(other)]:
            return one, other
    raise ValueError(f"one of its merges is {shown(merge)}; expected two tokens")


def _content(token: Any) -> str:
    """The text of an added token. Raises ValueError unless it is a plain one, with an id."""
    match token:
        case {"id": number, "content": str(content)} if _is_id(number) and 0 < len(content) <= MOST_LETTERS:
            _expect_unset(f"added token {shown(content)}", token, {"id", "content", "normalized", "special"})
            return content
    raise ValueError(f"an added token is {shown(token)}; expected an id and 1 to {MOST_LETTERS} letters of content")


def _expect_type(what: str, found: Any, expected: str) -> None:
    if found != expected:
        raise ValueError(f"its {what} is of type {shown(found)}; expected {expected!r}")


def _expect_unset(what: str, part: dict[str, Any], known: set[str]) -> None:
    """Raise ValueError for a field that is set and unknown here, such as dropout, or a prefix inside words."""
    for name in part.keys() - known:
        if part[name]:
            raise ValueError(f"its {what} sets {shown(name)} to {shown(part[name])}; GPT-2's does not")


def _object(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"its {what} is {shown(value)}; expected an object of named fields")
    return value


def _list(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"its {what} is {shown(value)}; expected a list")
    return value
