"""Text <-> ids."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
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
    with pytest.raises(CheckpointError, match="cannot be used"):
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


def test_a_text_that_would_not_come_back_is_refused(tmp_path: Path) -> None:
    def change(parsed: dict[str, Any]) -> None:
        vocab = parsed["model"]["vocab"]
        vocab["in the place of the byte 0"] = vocab.pop("\u0100")

    with pytest.raises(ValueError, match=r"tokenizer loses something at character 1: .* becomes 'b'"):
        changed(tmp_path, change).encode("a\0b")


def test_an_id_beyond_the_models_vocabulary_is_refused_by_the_model(tmp_path: Path, tiny: GPT2) -> None:
    def change(parsed: dict[str, Any]) -> None:
        parsed["added_tokens"].append({**SPECIAL, "id": 4096, "content": "<pad>"})

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


def add(content: str, **fields: object) -> Change:
    """Append an added token with the next id."""
    token = {**SPECIAL, "id": 4096, "content": content, **fields}
    return lambda parsed: parsed["added_tokens"].append(token)


def byte_levels(count: int) -> dict[str, object]:
    """So many pre-tokenizers in a row."""
    return {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False}] * count}


LETTERS = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
BEYOND: dict[str, tuple[Change, str]] = {
    "a letter for 10^12": (
        lambda t: t.update(decoder={"type": "Sequence", "decoders": [{"type": "ByteLevel"}, *[LETTERS] * 4]}),
        "decoder is of type 'Sequence'; expected 'ByteLevel'",
    ),
    "no decoder": (lambda t: t.update(decoder=None), "decoder is None; expected an object"),
    "a letter for ten": (lambda t: t.update(normalizer=LETTERS), "sets 'normalizer' to"),
    "lower case": (lambda t: t.update(normalizer={"type": "Lowercase"}), "sets 'normalizer' to"),
    "a part that nobody knows": (lambda t: t.update(rewriter={"type": "Zip"}), "file sets 'rewriter' to"),
    "a list of words": (lambda t: t["model"].update(type="WordLevel"), "model is of type 'WordLevel'; expected 'BPE'"),
    "other ids every time": (lambda t: t["model"].update(dropout=0.5), "model sets 'dropout' to 0.5"),
    "a prefix within words, at which the backend panics": (
        lambda t: t["model"].update(continuing_subword_prefix="##"),
        "model sets 'continuing_subword_prefix' to '##'",
    ),
    "words before merges": (lambda t: t["model"].update(ignore_merges=True), "model sets 'ignore_merges' to True"),
    "a space in front": (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer adds a space"),
    "a text that is one word": (lambda t: t["pre_tokenizer"].update(use_regex=False), "pre_tokenizer adds a space"),
    "cut twice": (lambda t: t.update(pre_tokenizer=byte_levels(2)), "pre_tokenizer is of type 'Sequence'"),
    "cut never": (lambda t: t.update(pre_tokenizer=None), "pre_tokenizer is None"),
    "an id with two tokens": (lambda t: t["model"]["vocab"].update({"a" * 900: 64}), "gives an id twice"),
    "an id that is a fraction": (lambda t: t["model"]["vocab"].update(qq=4096.5), "gives an id twice, or one that"),
    "a token of a page": (lambda t: t["model"]["vocab"].update({"a" * 1025: 4096}), "token of more than 1024 letters"),
    "three that merge": (lambda t: t["model"]["merges"].append(["a", "b", "c"]), "merges is .*; expected two tokens"),
    "spaces swallowed": (add("<mask>", lstrip=True), "token '<mask>' sets 'lstrip' to True"),
    "a gap before an added token": (add("<pad>", id=70_000), "'<pad>' has the id 70000; expected 4096"),
    "an added token of a page": (add("x" * 1025), "expected an id and 1 to 1024 letters"),
    "an added token that is nothing": (add(""), "expected an id and 1 to 1024 letters"),
    "added tokens without end": (
        lambda t: t["added_tokens"].extend({"id": 4096 + i, "content": f"{i:<1000}"} for i in range(1100)),
        "more than 1048576 letters together",
    ),
    "levels without end": (lambda t: t.update(x=json.loads("[" * 900 + "]" * 900)), "cannot be used"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_a_file_that_asks_for_more_than_gpt2s_tokenizer_does_is_refused(tmp_path: Path, case: str) -> None:
    change, sentence = BEYOND[case]
    with pytest.raises(CheckpointError, match=sentence) as error:
        changed(tmp_path, change)
    assert "Take GPT-2's byte-level BPE" in str(error.value)


TEXT = "It was the best of times,  two  spaces\n\nand 1234567 <|endoftext|> naïve 漢字 🙂"


def as_openais(parsed: dict[str, Any]) -> None:
    """The layout of openai-community/gpt2: no type of the model, merges with a space between, another special token."""
    model = parsed["model"]
    for name in ("type", "byte_fallback", "ignore_merges"):
        del model[name]
    model.update(continuing_subword_prefix="", end_of_word_suffix="", merges=[" ".join(m) for m in model["merges"]])
    model["vocab"]["<|endoftext|>"] = 4095
    parsed["added_tokens"][0]["normalized"] = True
    parsed.update(post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False})
    del parsed["pre_tokenizer"]["use_regex"]


def doubled(parsed: dict[str, Any]) -> None:
    """A template that gives a text twice, which no encoding here asks for."""
    sequence = [{"Sequence": {"id": "A", "type_id": 0}}] * 2
    parsed["post_processor"] = {"type": "TemplateProcessing", "single": sequence, "pair": [], "special_tokens": {}}


SAME: dict[str, Change] = {
    "as OpenAI's": as_openais,
    "a sequence of one": lambda t: t.update(pre_tokenizer=byte_levels(1)),
    "a template": doubled,
    "one more token": add("<pad>"),
}


@pytest.mark.parametrize("case", SAME)
def test_every_layout_of_gpt2s_tokenizer_gives_the_same_ids(tmp_path: Path, case: str) -> None:
    backend = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert changed(tmp_path, SAME[case]).encode(TEXT) == backend.encode(TEXT).ids


@pytest.mark.parametrize("options", [{}, {"add_bos_token": True}, {"pad_token": "<pad>"}])
def test_a_tokenizer_that_transformers_saved_gives_the_same_ids(tmp_path: Path, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(TINY, **options)
    if "pad_token" in options:
        theirs(["a text of some words", "one"], padding="max_length", truncation=True, max_length=3)
    theirs.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).encode(TEXT) == TOKENIZER.encode(TEXT)


def test_a_file_of_more_bytes_than_any_tokenizer_has_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(CheckpointError, match="has 1073741824 bytes"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_panic_while_decoding_is_a_sentence() -> None:
    backend = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    backend.decoder = tokenizers.decoders.Strip("a", 0, 9)
    with pytest.raises(ValueError, match="cannot decode"):
        Tokenizer(backend).encode("a")


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
    "a million letters on one line": "ab" * 500_000,
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
