"""Classes of data and of a model meet by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from remarks import Remarks

from tarflow_fast.data import ImageData, matched, renamed
from tarflow_fast.errors import ArgumentError

NAMES = ("apple", "kiwi", "plum")


def data(labels: list[int], names: tuple[str, ...] | None = None, numbers: tuple[int, ...] | None = None) -> ImageData:
    return ImageData(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), torch.tensor(labels), names, numbers)


def labels(found: ImageData) -> list[int]:
    assert found.labels is not None
    return found.labels.tolist()


@given(model=st.permutations([*NAMES, "fig"]), own=st.permutations(NAMES), kept=st.integers(1, 3))
def test_names_decide(model: list[str], own: list[str], kept: int) -> None:
    names = tuple(own[:kept])
    found = matched(data(list(range(kept)), names), model, 4)
    assert [model[label] for label in labels(found)] == list(names)
    assert found.class_names == tuple(model)
    assert labels(matched(found, model, 4)) == labels(found)


def test_accents_are_one_name() -> None:
    assert labels(matched(data([0], ("cafe\u0301",)), ["tea", "caf\u00e9"], 2)) == [1]


@pytest.mark.parametrize("names", [("apple", "kiwi", "fig"), ("Apple",), ("0", "1", "2")])
def test_names_that_the_model_does_not_know(names: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"data: expected classes that the model knows .*'apple', 'kiwi', 'plum'"):
        matched(data(list(range(len(names))), names), NAMES, 3)


def test_numbers_count_where_the_data_has_no_names() -> None:
    assert labels(matched(data([2, 0, 2]), NAMES, 3)) == [2, 0, 2]
    assert labels(matched(data([2, 0, 2]), None, 3)) == [2, 0, 2]
    assert labels(matched(data([1, 0], numbers=(1, 2)), NAMES, 3)) == [2, 1]
    with pytest.raises(ArgumentError, match="expected labels of 3 classes, got label 3"):
        matched(data([0, 3]), NAMES, 3)


def test_names_that_are_numbers() -> None:
    """A model of labels 1, 2, 7, or of folders "1", "10", "2"."""
    assert labels(matched(data([1, 7, 2]), ("1", "2", "7"), 3)) == [0, 2, 1]
    assert labels(matched(data([1, 10, 2]), ("1", "10", "2"), 3)) == [0, 1, 2]
    with pytest.raises(ArgumentError, match="got '0'"):
        matched(data([0, 1]), ("1", "2", "7"), 3)


def test_a_model_without_names(remarks: Remarks) -> None:
    assert labels(matched(data([0, 2], NAMES), None, 3)) == [0, 2]
    assert "in order: 'apple', 'kiwi', 'plum'" in "\n".join(remarks.messages)
    with pytest.raises(ArgumentError, match="3 classes, as the model has no names"):
        matched(data([0, 1], NAMES[:2]), None, 3)


def test_a_model_or_data_without_classes() -> None:
    assert matched(data([0, 1], NAMES), None, 0).labels is None
    assert matched(ImageData(torch.zeros(1, 1, 2, 2, dtype=torch.uint8)), NAMES, 3).labels is None


def test_aliases() -> None:
    """What the folders were called before they were renamed."""
    folders = ("n1", "n2", "n3")
    assert labels(matched(data([0, 1], ("n3", "n1")), NAMES, 3, aliases=folders)) == [2, 0]
    assert labels(matched(data([0], ("plum",)), NAMES, 3, aliases=folders)) == [2]


def test_renaming() -> None:
    assert renamed(data([0, 1], ("n1", "n2")), ("a", "b", "c")).class_names == ("a", "b", "c")
    assert renamed(data([0, 1]), ("a", "b")).class_names == ("a", "b")
    assert renamed(data([0, 2], NAMES), NAMES).class_names == NAMES


@pytest.mark.parametrize(
    "names", [("kiwi", "apple", "plum"), ("kiwi", "plum", "fig"), ("fig", "apple", "pear"), ("a", "b", "c", "apple")]
)
def test_lists_that_permute_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentError, match="class_names: expected names in the order of the data's own classes"):
        renamed(data([0, 1, 2], NAMES), names)


def test_names_that_cannot_be() -> None:
    with pytest.raises(ArgumentError, match="class_names: expected names for labels up to 2"):
        renamed(data([0, 1, 2], NAMES), ("a", "b"))
    with pytest.raises(ArgumentError, match="'a' more than once"):
        renamed(data([0, 1, 2], NAMES), ("a", "a", "b"))
    with pytest.raises(ArgumentError, match="no labels"):
        renamed(ImageData(torch.zeros(1, 1, 2, 2, dtype=torch.uint8)), ("a",))
