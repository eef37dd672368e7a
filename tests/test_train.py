"""Training: what is learnt from and held out, what a step does, and a run that is stopped and goes on."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file

from experiments.behaviour import copies, observe
from experiments.tools import train
from minigpt import GPT2, GPT2Config, Tokenizer, parity
from minigpt.files import open_tensors
from tests.blocks import Parallel
from tests.conftest import SMALL, draw
from tests.test_study import run_main

Run = Callable[..., tuple[int, str, str]]

TRAINING = (
    "--n-layer",
    2,
    "--n-embd",
    24,
    "--n-head",
    2,
    "--n-positions",
    16,
    "--vocab-size",
    300,
    "--batch",
    4,
    "--warmup-steps",
    10,
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two short books."""
    (tmp_path / "corpus").mkdir()
    for name in ("one", "two"):
        text = "".join(f"{name} sheep and {count} dogs went over the hill.\n" for count in range(300))
        (tmp_path / "corpus" / f"{name}.txt").write_text(text)
    return tmp_path / "corpus"


def train_in(run_train: Run, corpus: Path, output: Path, steps: int) -> str:
    code, out, err = run_train("--corpus", corpus, "--output", output, "--tokens", steps * 64, *TRAINING)
    assert code == 0, err
    return out


@pytest.fixture
def run_train(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the training's command line."""
    return lambda *arguments: run_main(lambda: typer.run(train.main), monkeypatch, capfd, *arguments)


def test_training_learns_and_leaves_a_certified_checkpoint(run_train: Run, corpus: Path, tmp_path: Path) -> None:
    out = train_in(run_train, corpus, tmp_path / "out", 60)
    with open_tensors(tmp_path / "out" / train.STATE_FILE) as file:
        losses = file.get_tensor("losses").tolist()
    assert len(losses) == 60
    assert losses[-1] < losses[0] - 1
    assert "held-out loss of the stored checkpoint" in out
    model = GPT2.from_pretrained(tmp_path / "out")
    assert parity.certify(model).passed
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.vocab_size == model.config.vocab_size == 300


def test_a_training_of_another_block_leaves_a_checkpoint_of_that_block(
    run_train: Run, corpus: Path, tmp_path: Path
) -> None:
    arguments = ("--corpus", corpus, "--output", tmp_path / "out", "--tokens", 4 * 64, *TRAINING)
    code, _, err = run_train(*arguments, "--block", "tests.blocks:Parallel")
    assert code == 0, err
    with pytest.raises(ValueError, match=r"tests\.blocks:Parallel"):
        GPT2.from_pretrained(tmp_path / "out")
    model = GPT2.from_pretrained(tmp_path / "out", block=Parallel)
    assert parity.certify(model).passed
    assert "other settings" in run_train(*arguments)[2]


def test_a_stopped_training_goes_on_to_the_identical_losses(
    run_train: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY", 5)
    train_in(run_train, corpus, tmp_path / "whole", 20)
    step = train.take_step

    def stop_at_13(*arguments: Any) -> float:
        if arguments[-1] == 13:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(train, "take_step", stop_at_13)
    assert run_train("--corpus", corpus, "--output", tmp_path / "cut", "--tokens", 20 * 64, *TRAINING)[0] == 130
    monkeypatch.setattr(train, "take_step", step)
    train_in(run_train, corpus, tmp_path / "cut", 20)
    for name in (train.LOG_FILE, "model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_training_with_other_settings_is_refused(run_train: Run, corpus: Path, tmp_path: Path) -> None:
    train_in(run_train, corpus, tmp_path / "out", 3)
    code, _, err = run_train("--corpus", corpus, "--output", tmp_path / "out", "--tokens", 4 * 64, *TRAINING)
    assert (code, "other settings" in err) == (2, True)


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0\0{}", None])
def test_a_broken_state_is_a_sentence(run_train: Run, corpus: Path, tmp_path: Path, content: bytes | None) -> None:
    """Empty, without anything in it, and with everything but of another shape."""
    arguments = ("--corpus", corpus, "--output", tmp_path / "out", "--tokens", 3 * 64, *TRAINING)
    assert run_train(*arguments)[0] == 0
    state = tmp_path / "out" / train.STATE_FILE
    if content is None:
        with open_tensors(state) as file:
            about, tensors = file.metadata(), {name: file.get_tensor(name)[:1] for name in file.keys()}  # noqa: SIM118
        save_file(tensors, state, about)
    else:
        state.write_bytes(content)
    code, _, err = run_train(*arguments)
    assert (code, err.count("\n"), str(state) in err) == (2, 1, True)


def test_a_corpus_without_text_is_refused(run_train: Run, tmp_path: Path) -> None:
    code, _, err = run_train("--corpus", tmp_path, "--output", tmp_path / "out")
    assert (code, "no *.txt" in err) == (2, True)
    (tmp_path / "short.txt").write_text("a few words")
    code, _, err = run_train("--corpus", tmp_path, "--output", tmp_path / "out", *TRAINING)
    assert (code, "bring more text" in err) == (2, True)


def test_another_corpus_is_another_training(run_train: Run, corpus: Path, tmp_path: Path) -> None:
    train_in(run_train, corpus, tmp_path / "out", 3)
    book = corpus / "two.txt"
    book.write_text(book.read_text().replace("299 dogs", "992 dogs"))
    code, _, err = run_train("--corpus", corpus, "--output", tmp_path / "out", "--tokens", 3 * 64, *TRAINING)
    assert (code, "other settings" in err) == (2, True)


@pytest.mark.parametrize(("option", "share"), [("dropout", 1), ("dropout", -0.1), ("repeat", 1.5)])
def test_a_share_out_of_range_is_a_sentence(
    run_train: Run, corpus: Path, tmp_path: Path, option: str, share: float
) -> None:
    code, _, err = run_train("--corpus", corpus, "--output", tmp_path / "out", f"--{option}", share)
    assert (code, f"--{option} is {share:g}; expected a share from 0 to below 1" in err) == (2, True)


def test_every_twentieth_stretch_is_held_out_and_nothing_is_lost(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "STRETCH", 50)
    texts = train.read_corpus(corpus)
    tokenizer = train.train_tokenizer(texts, 300)
    encoded = [tokenizer.encode(text).ids for text in texts]
    learned, held_out = train.split(texts, tokenizer, 16)
    numbers = [[index // 50 % 20 == 7 for index in range(len(ids))] for ids in encoded]
    for part, held in ((learned, False), (held_out, True)):
        expected = [
            token
            for ids, of in zip(encoded, numbers, strict=True)
            for token, it in zip(ids, of, strict=True)
            if it == held
        ]
        assert part.ids.tolist() == expected
    assert len(held_out.starts) == 3 * sum(of.count(True) // 50 for of in numbers), "three whole windows a stretch"


def test_no_window_goes_from_one_stretch_or_text_to_another(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "STRETCH", 50)
    texts = train.read_corpus(corpus)
    tokenizer = train.train_tokenizer(texts, 300)
    runs = [" ".join(map(str, tokenizer.encode(text).ids)) for text in texts]
    for part in train.split(texts, tokenizer, 16):
        _, targets = train.windows(part, part.starts, 16, 299)
        found = {" ".join(map(str, window)) for window in targets.tolist()}
        assert len(found) > 20
        assert all(any(f" {window} " in f" {run} " for run in runs) for window in found)


def test_every_token_that_a_window_can_begin_at_begins_one() -> None:
    part = train._part([[*range(10)], [*range(10, 13)], [*range(13, 17)]], 4, 1)
    assert part.starts.tolist() == [*range(7), 13]
    assert train._part([[*range(10)], [*range(10, 13)], [*range(13, 17)]], 4, 4).starts.tolist() == [0, 4, 13]


def test_every_window_begins_with_the_end_of_a_text() -> None:
    part = train.Part(torch.arange(10, 30), torch.tensor([2, 5]))
    inputs, targets = train.windows(part, part.starts, 4, 99)
    assert inputs.tolist() == [[99, 12, 13, 14], [99, 15, 16, 17]]
    assert targets.tolist() == [[12, 13, 14, 15], [15, 16, 17, 18]]
    drawn, _ = train.batch_of(3, part, train.Schedule(batch=5, window=4), 99)
    assert drawn.shape == (5, 4)
    assert set(drawn[:, 0].tolist()) == {99}


@pytest.mark.parametrize("length", [16, 512])
def test_a_stretch_comes_again_later_in_a_share_of_the_windows(length: int) -> None:
    generator = np.random.default_rng(0)
    orders = [train._order(length, generator, 0.25).tolist() for _ in range(400)]
    plain, repeated = [*range(length)], [order for order in orders if order != [*range(length)]]
    assert 70 < len(repeated) < 130
    counts = set[int]()
    for order in repeated:
        assert len(order) == length
        again = next(at for at in range(1, length) if order[at] != order[at - 1] + 1)
        begin = order[again]
        count = next((n for n in range(1, length - again) if order[again + n] != begin + n), length - again)
        while begin + count > again:  # the tokens after the copy go on where it was put in
            count -= 1
        assert order == [*plain[:again], *plain[begin : begin + count], *plain[again : length - count]]
        counts.add(count)
    assert length // 8 <= min(counts)
    assert max(counts) <= length // 2
    assert len(counts) > length // 8
    assert [train._order(length, generator, 0.0).tolist() for _ in range(20)] == [plain] * 20


def test_the_rate_rises_and_falls_to_zero() -> None:
    schedule = train.Schedule(tokens=100 * 8 * 4, batch=8, window=4, learning_rate=1.0, warmup_steps=20)
    rates = [schedule.rate(step) for step in range(100)]
    assert (schedule.steps, rates[0], rates[9], rates[19], rates[20]) == (100, 0.05, 0.5, 1.0, 1.0)
    assert rates[60] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 80)


def test_only_matrices_that_read_from_the_stream_decay() -> None:
    model = GPT2(GPT2Config(**SMALL))
    reading, others = train.make_optimizer(model, train.Schedule(weight_decay=0.3)).param_groups
    decayed = {id(weight) for weight in reading["params"]}
    names = {name for name, weight in train.trained(model) if id(weight) in decayed}
    of_blocks = ("attention.qkv.weight", "mlp.expand.weight")
    assert names == {f"blocks.{layer}.{name}" for layer in range(SMALL["n_layer"]) for name in of_blocks}
    assert (reading["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert len(reading["params"]) + len(others["params"]) == len(train.trained(model))


def test_what_sublayers_write_drops_out_in_training_alone() -> None:
    model = draw(GPT2Config(**SMALL), dtype=torch.float32)
    ids = torch.arange(8)[None]
    plain = model.eval()(ids)
    train.drop(model, 0.5)
    assert torch.equal(model(ids), plain)
    model.train()
    torch.manual_seed(1)
    first = model(ids)
    torch.manual_seed(1)
    assert torch.equal(model(ids), first)
    assert not torch.equal(model(ids), plain)
    with torch.no_grad():  # with everything dropped no block writes
        nothing = draw(GPT2Config(**SMALL), dtype=torch.float32).train()
        train.drop(nothing, 1.0)
        assert torch.equal(nothing.last_depth(ids), nothing.embed(ids))


def test_the_log_says_what_the_model_does(
    run_train: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "REPORT_EVERY", 8)
    out = train_in(run_train, corpus, tmp_path / "out", 20)
    with (tmp_path / "out" / train.LOG_FILE).open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    with open_tensors(tmp_path / "out" / train.STATE_FILE) as file:
        losses = file.get_tensor("losses").tolist()
        weights = {name.removeprefix("weight/"): file.get_tensor(name) for name in file.keys() if "weight/" in name}  # noqa: SIM118
    assert [row["step"] for row in rows] == [8, 16, 20]
    for row, start, stop in zip(rows, (0, 8, 16), (8, 16, 20), strict=True):
        assert row["training_loss"] == pytest.approx(sum(losses[start:stop]) / (stop - start))
    model = GPT2.from_pretrained(tmp_path / "out")
    model.load_state_dict(weights, strict=False)
    texts, tokenizer = train.read_corpus(corpus), train.train_tokenizer(train.read_corpus(corpus), 300)
    part = train.split(texts, tokenizer, 16)[1]
    _, targets = train.windows(part, part.starts, 16, 299)
    with torch.no_grad():
        logits = model(torch.cat([torch.full((len(targets), 1), 299), targets[:, :-1]], 1))
    loss = float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert rows[-1]["held_out_loss"] == pytest.approx(loss, rel=1e-5)
    assert rows[-1]["induction_gain"] == pytest.approx(copies(model).value, rel=1e-4)
    chosen = targets[torch.linspace(0, len(targets) - 1, train.OBSERVED_WINDOWS).round().long(), :-1].tolist()
    assert rows[-1]["norm_of_position_0"] == pytest.approx(float(observe(model, chosen).norms[:, 1].mean(0).max()))
    assert f"step 20/20: training loss {rows[-1]['training_loss']:.4f}, held-out loss {loss:.4f}" in out


def test_the_held_out_texts_lie_beside_the_checkpoint_and_give_its_loss(
    run_train: Run, corpus: Path, tmp_path: Path
) -> None:
    out = train_in(run_train, corpus, tmp_path / "out", 5)
    lines = (tmp_path / "out" / train.HELD_OUT_FILE).read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert all(any(text in book for book in train.read_corpus(corpus)) for text in texts)
    tokenizer, model = Tokenizer.from_pretrained(tmp_path / "out"), GPT2.from_pretrained(tmp_path / "out")
    total = 0.0
    for text in texts:
        ids = torch.tensor([299, *tokenizer.encode(text)])
        with torch.no_grad():
            total += float(F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum"))
    said = f"over {len(texts)} windows: {total / (16 * len(texts)):.4f} nats per token, "
    assert f"{said}{total / math.log(2) / sum(map(len, texts)):.4f} bits per character" in out
