"""Labels: what --labels and `Sampler.sample` understand, always a matter of the image's number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from cases import random_model
from hypothesis import given
from hypothesis import strategies as st
from tolerances import BATCH, assert_close

from tarflow_fast.cli.labels import choose, read_lines, split_list
from tarflow_fast.errors import ArgumentError
from tarflow_fast.models.tarflow import TarFlow
from tarflow_fast.sampling.labels import LabelRule
from tarflow_fast.sampling.noise import random_label
from tarflow_fast.sampling.sampler import Sampler

IMAGENET = ["tench, Tinca tinca", "goldfish", "shark", 'a "great" one', "0-4"]
NUMBERS = ["1", "10", "2"]


def named(names: list[str] | None, classes: int | None = None) -> TarFlow:
    model = random_model(img_size=4, num_classes=len(names or []) if classes is None else classes)
    if names is not None:
        model.metadata["class_names"] = names
    return model


@pytest.mark.parametrize(
    ("names", "text", "wanted"),
    [
        (IMAGENET, "tench, Tinca tinca", [0]),
        (IMAGENET, "goldfish,tench, Tinca tinca , shark", [1, 0, 2]),
        (IMAGENET, '"tench, Tinca tinca", "a ""great"" one"', [0, 3]),
        (IMAGENET, "TENCH, tinca TINCA", [0]),
        (IMAGENET, "0-4", [4]),  # a name always wins
        (IMAGENET, "0-3", [0, 1, 2, 3]),
        (IMAGENET, "shark,1 - 2,-1", [2, 1, 2, -1]),
        (NUMBERS, "1", [0]),
        (NUMBERS, "10,2", [1, 2]),
        (NUMBERS, "#1,#2,0", [1, 2, 0]),
        (NUMBERS, "1-2", [0, 2]),  # the classes named so, as are 1 and 2 alone
        (NUMBERS, "1-10", [0, 2, 1]),
        (NUMBERS, "#1-#2", [1, 2]),
        (NUMBERS, "#1 - 2, #0-0", [1, 2, 0]),
        (["2", "cat", "0"], "1-1", [1]),  # no such names, so numbers
        (["01", "02", "03"], "1-3,02", [0, 1, 2, 1]),
        (IMAGENET, "#0-#4", [0, 1, 2, 3, 4]),
        (IMAGENET, "0,1,", [0, 1]),
        (None, "0.0,1.,2.000000000000000000e+00,-1.0,None", [0, 1, 2, -1, -1]),
        (["1", "0"], "1.0,1", [1, 0]),
        (["all", "none", "random"], "all", [0]),
        (["all", "none", "random"], "random,none", [2, 1]),
        (["@a", "b"], "@a", [0]),
        (["cat", "Cat"], "Cat,cat", [1, 0]),
        (None, "2,0", [2, 0]),
        (None, "-5,none", [-1, -1]),
    ],
)
def test_words_of_a_list(names: list[str] | None, text: str, wanted: list[int]) -> None:
    assert choose(text, named(names, None if names else 3), 0).entries == wanted


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("cow", "there is no class 'cow'"),
        ("2-1", "runs backwards"),
        ("", "no class ''"),
        ("1,,2", "no class ''"),
        (",1", "an entry of the list is empty"),
        ("0,1,,", "an entry of the list is empty"),
        (",", "an entry of the list is empty"),
        ("#2-#1", "runs backwards"),
        ("1.5", "no class '1.5'"),
        ("1e999", "no class '1e999'"),
        ("0x1", "no class '0x1'"),
        ("9" * 5000, "no class"),
        ("\x1b[31m", r"'\\x1b\[31m'"),
    ],
)
def test_unknown_words_are_wrong_usage(text: str, what: str) -> None:
    with pytest.raises(click.BadParameter, match=what):
        choose(text, named(IMAGENET), 0)


@pytest.mark.parametrize("text", ["5", "0-5", "0-999999999999", "#7", "#0-#5", "5.0", "1.0e99"])
def test_numbers_that_the_model_does_not_have_are_refused_at_once(text: str) -> None:
    with pytest.raises(ArgumentError, match="labels: expected classes below 5"):
        choose(text, named(IMAGENET), 0)


@pytest.mark.parametrize("text", ["0-2", "2-3", "1-9"])
def test_a_range_with_one_end_that_is_a_name_is_no_answer(text: str) -> None:
    low, high = text.split("-")
    with pytest.raises(click.BadParameter, match=f"for numbers #{low}-#{high}"):
        choose(text, named(NUMBERS), 0)


@pytest.mark.parametrize("text", ["ALL", "Random", "NONE", "aLl"])
def test_words_in_any_case_unless_a_class_has_that_name(text: str) -> None:
    model = named(IMAGENET)
    assert choose(text, model, 0).described == choose(text.lower(), model, 0).described
    assert choose(text, named(["x", text.lower()]), 0).entries == [1]


def test_a_name_of_two_classes_is_no_answer() -> None:
    for text in ("crane", "CRANE"):
        with pytest.raises(ArgumentError, match="as are 0, 2"):
            choose(text, named(["crane", "x", "crane"]), 0)
    assert choose("2", named(["crane", "x", "crane"]), 0).entries == [2]


def test_all_none_and_the_default() -> None:
    model = named(None, 1000)
    for text in (None, "all", " all "):
        chosen = choose(text, model, 0)
        assert chosen.entries == list(range(1000))
        assert chosen.described == "all 1000 in turn"
    assert choose("none", model, 0).entries == []
    plain = random_model(img_size=4)
    assert choose(None, plain, 0).entries == []
    assert choose("none", plain, 0).described is None
    for text in ("all", "random"):
        with pytest.raises(click.BadParameter, match="no classes"):
            choose(text, plain, 0)


def test_a_file_has_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("\ufefftench, Tinca tinca\r\n\r\n 1-2 \n-1\n".encode())
    assert choose(f"@{path}", named(IMAGENET), 0).entries == [0, 1, 2, -1]
    np.savetxt(path, np.array([1.0, 0, 2]))
    assert choose(f"@{path}", named(IMAGENET), 0).entries == [1, 0, 2]
    path.write_bytes(b"\xff")
    with pytest.raises(click.UsageError, match="UTF-8"):
        read_lines(str(path), "--labels")
    path.write_bytes(b"\n")
    with pytest.raises(click.BadParameter, match="at least one"):
        choose(f"@{path}", named(IMAGENET), 0)


@given(words=st.lists(st.text("ab\", '\\", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=4))
def test_quoted_words_come_back(words: list[str]) -> None:
    quoted = ['"' + word.replace('"', '""') + '"' for word in words]
    assert split_list(", ".join(quoted)) == words


def test_random_labels_are_even_and_of_the_seed_and_the_number_alone() -> None:
    labels = [random_label(0, i, 5) for i in range(1000)]
    assert labels == [random_label(0, i, 5) for i in range(1000)]
    assert np.bincount(labels, minlength=5).min() > 150
    assert sum(a == random_label(1, i, 5) for i, a in enumerate(labels)) < 300
    chosen = choose("random", named(IMAGENET), 3)
    assert chosen.entries is None
    assert callable(chosen.labels)
    assert [chosen.labels(i) for i in range(20)] == [random_label(3, i, 5) for i in range(20)]


KINDS: list[Any] = [
    None,
    1,
    "goldfish",
    [0, "shark", -1],
    ("GOLDFISH",),
    torch.tensor([2, 0]),
    lambda i: i % 4,
    lambda i: IMAGENET[i % 3],
]


@pytest.mark.parametrize("labels", KINDS, ids=lambda labels: getattr(labels, "__name__", str(labels)))
def test_first_continues(labels: Any) -> None:
    sampler = Sampler(named(IMAGENET))
    whole, rest = sampler.sample(10, labels, seed=3), sampler.sample(6, labels, seed=3, first=4)
    assert_close(whole.images[4:], rest.images, BATCH)
    if whole.labels is None:
        assert rest.labels is None
    else:
        assert rest.labels is not None
        assert torch.equal(whole.labels[4:], rest.labels)


def test_names_are_the_numbers_that_they_stand_for() -> None:
    sampler = Sampler(named(IMAGENET))
    out = sampler.sample(3, ["shark", "tench, Tinca tinca"])
    assert out.labels is not None
    assert out.labels.tolist() == [2, 0, 2]
    assert_close(out.images, sampler.sample(3, [2, 0]).images, 0.0)


@pytest.mark.parametrize("labels", ["cow", ["goldfish", "cow"], lambda i: "cow", lambda i: 5, lambda i: 0.5])
def test_what_is_no_label(labels: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^labels: expected"):
        Sampler(named(IMAGENET)).sample(2, labels)


def test_numbers_may_be_as_large_as_they_come() -> None:
    rule = LabelRule([0, 1, 2], 3, [])
    found = rule(range(2**62, 2**62 + 4))
    assert found is not None
    assert found.tolist() == [(2**62 + i) % 3 for i in range(4)]
