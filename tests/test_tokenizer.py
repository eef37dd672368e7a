"""Text <-> ids."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt import CheckpointError, Tokenizer
from tests.conftest import TINY

TOKENIZER = Tokenizer.from_pretrained(TINY)


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_decodes_to_itself(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


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
