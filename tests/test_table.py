"""Tables: numbers on named axes, and the rows that they make."""

import math
from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close

from experiments.harness.table import Table, by_text, of_text, of_windows
from experiments.page.figures import dataset


class Head(NamedTuple):
    layer: int
    head: int


@pytest.fixture
def table() -> Table:
    """Every number says where it stands: metric 0 or 1, layer 2 or 5, depth 0 to 3."""
    value = torch.tensor([[[100 * m + 10 * layer + depth for depth in range(4)] for layer in (2, 5)] for m in (0, 1)])
    return Table({"metric": ["kl", "loss"], "layer": [2, 5], "depth": [0, 1, 2, "final"]}, value.double())


def test_a_label_takes_its_axis_away_and_a_list_keeps_it_in_its_order(table: Table) -> None:
    assert float(table.at(metric="loss", layer=5, depth="final").value) == 153
    part = table.at(depth=[2, 0], layer=5)
    assert part.axes == {"metric": ["kl", "loss"], "depth": [2, 0]}
    assert part.value.tolist() == [[52, 50], [152, 150]]
    assert table.at(layer=[]).value.shape == (2, 0, 4)
    assert table.at(**{"".join(["la", "yer"]): 5}).value.shape == (2, 4), "whichever string it is"


def test_a_label_that_is_not_there_is_a_sentence(table: Table) -> None:
    with pytest.raises(ValueError, match=r"There is no layer 3 in this table; it has 2, 5\."):
        table.at(layer=3)
    with pytest.raises(ValueError, match=r"There is no factor 0\.5 in this table; it has metric, layer, depth\."):
        table.at(factor=0.5)


def test_labels_that_do_not_fit_the_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 3\]; the axes' labels have \[3, 2\]"):
        Table({"layer": range(3), "depth": range(2)}, torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["value", "error", "windows", "low", "q3"])
def test_an_axis_may_not_be_called_as_a_column_of_numbers_is(name: str) -> None:
    with pytest.raises(ValueError, match=f"An axis is called '{name}', as a column of numbers is"):
        Table({name: [1, 2]}, torch.zeros(2))


def test_a_prompts_table_has_one_text() -> None:
    one = by_text(torch.tensor([[3.0, 4.0]]), depth=[0, 1])
    assert of_text({"norms": one})["norms"].value.tolist() == [3, 4]
    with pytest.raises(ValueError, match="'norms' has 3 texts, and one was run"):
        of_text({"norms": by_text(torch.zeros(3))})


def test_rows_are_tidy_finite_and_in_the_order_of_the_axes(table: Table) -> None:
    table.value[0, 0, 1] = torch.nan
    rows = list(table.rows(model="tiny"))
    assert list(rows[0]) == ["model", "metric", "layer", "depth", "value"]
    assert len(rows) == 15
    assert rows[-1] == {"model": "tiny", "metric": "loss", "layer": 5, "depth": "final", "value": 153.0}


def test_a_named_tuple_has_a_column_for_each_field() -> None:
    table = Table({"layer": [Head(2, 0), Head(2, 1)]}, torch.tensor([3.0, 4.0]))
    assert list(table.rows()) == [{"layer": 2, "head": 0, "value": 3.0}, {"layer": 2, "head": 1, "value": 4.0}]
    assert float(table.at(layer=Head(2, 1)).value) == 4


def test_an_axis_can_be_renamed_and_split(table: Table) -> None:
    named = table.named("layer", "block", ["second", "fifth"])
    assert torch.equal(named.at(block="fifth").value, table.at(layer=5).value)
    split = table.split("depth", half=["early", "late"], of=[0, 1])
    assert torch.equal(split.at(half="late", of=1).value, table.at(depth="final").value)


def test_the_spread_goes_wherever_the_value_goes() -> None:
    tables = {"kl": by_text(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), layer=[0, 1])}
    combined = {"kl": {"mean": torch.tensor([2.0, 3.5]), "low": torch.tensor([1.0, 2.0]), "high": torch.tensor([3, 5])}}
    table = of_windows(tables, combined, 2)["kl"].at(layer=1)
    assert (float(table.low), float(table.value), float(table.high)) == (2, 3.5, 5)
    assert list(table.rows()) == [{"value": 3.5, "low": 2.0, "high": 5, "windows": 2}]
    assert float(table.map(torch.exp).low) == pytest.approx(7.389, rel=1e-3)


def test_a_dataset_puts_every_number_under_its_label(table: Table) -> None:
    rows = [row for row in table.rows() if (row["layer"], row["depth"]) != (2, 1)]
    assert dataset(rows, "depth", ["final", 2, 1, 0], page="a") == [
        {"page": "a", "metric": "kl", "layer": 2, "value": [23, 22, None, 20]},
        {"page": "a", "metric": "kl", "layer": 5, "value": [53, 52, 51, 50]},
        {"page": "a", "metric": "loss", "layer": 2, "value": [123, 122, None, 120]},
        {"page": "a", "metric": "loss", "layer": 5, "value": [153, 152, 151, 150]},
    ]
    assert dataset(rows)[0] == {"metric": "kl", "layer": 2, "depth": 0, "value": 20.0}


def test_the_errors_of_a_table_are_its_distances_to_a_more_exact_one_by_label() -> None:
    table = by_text(torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, math.nan]]]), layer=[3, 7], metric=["a", "b", "c"])
    exact = by_text(torch.tensor([[[5.5, math.nan], [4.0, 1.0]]]), layer=[7, 3], metric=["b", "a"])
    expected = [[0.0, 2.0, math.nan], [4.0, 0.5, math.nan]]  # where the exact one is undefined, all of the number
    assert_close(table.beside(exact), torch.tensor([expected], dtype=torch.float64), equal_nan=True)
    with pytest.raises(ValueError, match="no metric 'd'"):
        table.beside(by_text(torch.zeros(1, 1, 1), layer=[3], metric=["d"]))


def test_errors_go_with_their_numbers() -> None:
    value, error = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    table = Table({"row": ["x", "y"], "column": ["a", "b"]}, value, error=error)
    part = table.at(row="y", column=["b", "a"])
    assert part.error is not None and part.error.tolist() == error[1].flip(0).tolist()
    assert [row["error"] for row in table.rows()] == error.flatten().tolist()
    assert list(next(iter(table.rows()))) == ["row", "column", "value", "error"]
    grown = table.map(torch.exp).error
    assert grown is not None
    assert_close(grown, (value + error).exp() - value.exp())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_counts_and_flags_have_errors_too(dtype: torch.dtype) -> None:
    table, exact = (by_text(torch.tensor([[0, 1, 1]]).roll(by, 1).to(dtype), which=["a", "b", "c"]) for by in (0, 1))
    assert table.beside(exact).tolist() == [[1.0, 1.0, 0.0]]
