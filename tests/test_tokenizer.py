"""Text <-> ids."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt import GPT2, CheckpointError, Tokenizer
from tests.conftest import TINY

TOKENIZER = Tokenizer.from_pretrained(TINY)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_decodes_to_itself(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_streamed_text_adds_up_to_the_text(text: str) -> None:
    pieces = list(TOKENIZER.stream(TOKENIZER.encode(text)))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_end_of_text_is_one_id_the_last() -> None:
    assert TOKENIZER.encode("a<|endoftext|>")[-1] == TOKENIZER.vocab_size - 1 == 4095


def test_ids_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    for text in ("It was the best of times,", "  two  spaces\n\nand 1234567 <|endoftext|>", "naïve 漢字 🙂"):
        assert TOKENIZER.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_vocabulary_and_merges_give_the_same_ids(tmp_path: Path) -> None:
    whole = json.loads((TINY / "tokenizer.json").read_text())["model"]
    vocab = {**whole["vocab"], "<|endoftext|>": 4095}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in whole["merges"]) + "\n"
    )
    text = "A tale of two cities, told twice.<|endoftext|>"
    assert Tokenizer.from_pretrained(tmp_path).encode(text) == TOKENIZER.encode(text)


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        TOKENIZER.encode("lone \ud800 surrogate")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": 3}'])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="broken"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


# Tokenizers of strangers: they encode, or refuse; they are never wrong.

Change = Callable[[dict[str, Any]], object]
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def changed(folder: Path, change: Change) -> Tokenizer:
    """The embedded tokenizer with something changed in its file."""
    parsed = json.loads((TINY / "tokenizer.json").read_text())
    change(parsed)
    (folder / "tokenizer.json").write_text(json.dumps(parsed))
    return Tokenizer.from_pretrained(folder)


LOSING: dict[str, tuple[Change, str, str]] = {
    "a space in front": (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "Once", "becomes ' Once'"),
    "a byte that is missing": (
        lambda t: t["model"]["vocab"].pop("\u0100"),
        "a\0b",
        r"at character 1: '\x00b' becomes 'b'",
    ),
    "no decoder": (lambda t: t.update(decoder=None), "two words", "loses something"),
    "spaces swallowed": (
        lambda t: t["added_tokens"].append({**SPECIAL, "id": 4096, "content": "<mask>", "lstrip": True}),
        "a <mask> b",
        "at character 1",
    ),
    "words of a list": (
        lambda t: t.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}),
        "b",
        "cannot encode the text",
    ),
}


@pytest.mark.parametrize("case", LOSING)
def test_a_text_that_would_not_come_back_is_refused(tmp_path: Path, case: str) -> None:
    change, text, sentence = LOSING[case]
    with pytest.raises(ValueError, match="tokenizer") as error:
        changed(tmp_path, change).encode(text)
    assert sentence in str(error.value)


def test_an_id_beyond_the_models_vocabulary_is_refused_by_the_model(tmp_path: Path, tiny: GPT2) -> None:
    def change(parsed: dict[str, Any]) -> None:
        parsed["added_tokens"].append({**SPECIAL, "id": 70_000, "content": "<pad>"})

    ids = changed(tmp_path, change).encode("so <pad>")
    assert max(ids) >= tiny.config.vocab_size
    with pytest.raises(ValueError, match="expected 0 to 4095"):
        tiny(torch.tensor([ids]))


def test_without_its_special_token_a_tokenizer_still_gives_every_text_back(tmp_path: Path) -> None:
    tokenizer = changed(tmp_path, lambda parsed: parsed.update(added_tokens=[]))
    ids = tokenizer.encode("an end <|endoftext|>")
    assert tokenizer.decode(ids) == "an end <|endoftext|>"
    assert max(ids) < 4095


def test_truncation_and_padding_that_a_file_asks_for_are_not_done(tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = changed(tmp_path, lambda parsed: parsed.update(truncation=cut))
    assert tokenizer.decode(tokenizer.encode("a text of many words, all kept")) == "a text of many words, all kept"


BEYOND: dict[str, tuple[Change, str]] = {
    "a prefix within words, at which the backend panics": (
        lambda t: t["model"].update(continuing_subword_prefix="##"),
        "a prefix inside words",
    ),
    "other ids every time": (lambda t: t["model"].update(dropout=0.5), "dropout"),
    "lower case": (lambda t: t.update(normalizer={"type": "Lowercase"}), "changes texts"),
    "a letter for ten": (
        lambda t: t.update(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}),
        "changes texts",
    ),
    "levels without end": (lambda t: t.update(x=json.loads("[" * 900 + "]" * 900)), "is broken"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_a_file_that_asks_for_more_than_gpt2s_tokenizer_does_is_refused(tmp_path: Path, case: str) -> None:
    change, sentence = BEYOND[case]
    with pytest.raises(CheckpointError, match=sentence):
        changed(tmp_path, change)


def test_a_file_of_more_bytes_than_any_tokenizer_has_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(CheckpointError, match="has 1073741824 bytes"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_panic_while_decoding_is_a_sentence(tmp_path: Path) -> None:
    strip = {"type": "Strip", "content": "a", "start": 0, "stop": 9}
    tokenizer = changed(tmp_path, lambda parsed: parsed.update(decoder=strip))
    with pytest.raises(ValueError, match="cannot decode"):
        tokenizer.encode("a")


def test_a_panic_of_the_backend_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panics of Rust are no Exception; Python's own way out of a program is left alone."""
    for raised, expected in ((Panic("range end"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)):
        monkeypatch.setattr("minigpt.tokenizer.read_json", partial(fail_with, raised))
        with pytest.raises(expected):
            changed(tmp_path, lambda parsed: None)


class Panic(BaseException):
    """As PyO3's PanicException."""


def fail_with(error: BaseException, *_: object) -> None:
    raise error


HARD_TEXTS = {
    "NUL": "a\0b\0\0",
    "ten million letters on one line": "ab" * 5_000_000,
    "right to left, and a mark that turns it": "abc \u202eשלום\u202c مرحبا",  # noqa: RUF001
    "combining characters, more than any letter has": "e" + "\u0301" * 500,
    "halves that only together are a letter": "👩\u200d👩\u200d👧\u200d👦 🇪🇺",
    "private and unassigned": "\ue000\U000e0001\U0010ffff\ufffe",
    "what looks like a special token": "<|endoftext|><|endoftext |><|ENDOFTEXT|>",
    "the sign for what cannot be decoded": "\ufffd\ufffd",
    "every kind of line end": "a\rb\nc\r\nd\u2028e\x85f",
}


@pytest.mark.parametrize("case", HARD_TEXTS)
def test_hard_texts_come_back(case: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(HARD_TEXTS[case])) == HARD_TEXTS[case]
