"""`build` makes a model of a family by its name, and tells by name what it cannot make."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

import tarflow_fast as tff
from tarflow_fast.errors import ArgumentError, BackendError
from tarflow_fast.flows import FAMILIES, Family, build
from tarflow_fast.flows.checkpoints import describe, rebuild
from tarflow_fast.flows.options import describe_options, read_options
from tarflow_fast.flows.registry import DIMENSIONS


@dataclass(frozen=True)
class Kinds:
    """One option of each type."""

    count: int = 1
    rate: float = 0.5
    on: bool = True
    widths: tuple[int, ...] = (8,)
    trace: Literal["exact", "hutchinson"] = "exact"
    word: str = ""
    some: int | None = None


def test_the_package_has_it() -> None:
    model = tff.flows.build("realnvp", data_shape=(2,), num_classes=3, couplings=2)
    assert (model.name, model.data_shape, model.num_classes, model.options.couplings) == ("realnvp", (2,), 3, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "realnpv"}, r"^name: expected one of nice, .*\(did you mean 'realnvp'\?\), got 'realnpv'$"),
        ({"name": 3}, "^name: expected one of nice"),
        ({"coupling": 3}, r"^options: expected one of couplings, .* \(did you mean 'couplings'\?\), got 'coupling'$"),
        ({"couplings": 0}, "^couplings: expected an integer >= 1, got 0$"),
        ({"couplings": 1.5}, r"^couplings: expected an integer .*, got 1\.5$"),
        ({"couplings": "many"}, "^couplings: expected an integer .*, got 'many'$"),
        ({"hidden": 3}, "^hidden: expected integers"),
        ({"data_shape": (2, 3)}, r"^data_shape: expected \(size,\) or \(channels, height, width\), .*, got \(2, 3\)$"),
        ({"data_shape": 2}, "^data_shape: expected the shape of one sample"),
        ({"data_shape": (0,)}, "^data_shape: expected an integer >= 1, got 0$"),
        ({"data_shape": (1, 6, 6)}, "^scales: expected at most 2, as 6×6 pixels cannot be halved more often, got 3$"),
        ({"num_classes": -1}, "^num_classes: expected an integer >= 0, got -1$"),
    ],
)
def test_what_cannot_be_made_is_told_by_name(arguments: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        build(**{"name": "realnvp", "data_shape": (2,), **arguments})


def test_options_come_as_values_or_as_text() -> None:
    values = {"count": 3, "rate": 1.0, "on": False, "widths": (4, 5), "trace": "hutchinson", "word": "a", "some": 3}
    text = {
        "count": "3",
        "rate": "1",
        "on": "false",
        "widths": "4,5",
        "trace": "hutchinson",
        "word": "a",
        "some": "3",
    }
    assert read_options("kinds", Kinds, values) == read_options("kinds", Kinds, text) == Kinds(**values)
    assert read_options("kinds", Kinds, {"some": "none"}) == read_options("kinds", Kinds, {"some": None}) == Kinds()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", "1.5"),
        ("rate", "fast"),
        ("on", "maybe"),
        ("widths", "4,x"),
        ("trace", "guess"),
        ("word", 3),
        ("some", "x"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: expected "):
        read_options("kinds", Kinds, {name: value})


def test_a_missing_library_is_told_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without_zuko(name: str, *rest: Any) -> Any:
        if name == "zuko":
            raise ModuleNotFoundError("No module named 'zuko'", name="zuko")
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_zuko)
    monkeypatch.setattr("tarflow_fast.flows.registry.__package__", "tarflow_fast.adapters")
    monkeypatch.delitem(__import__("sys").modules, "tarflow_fast.adapters.zuko", raising=False)
    with pytest.raises(BackendError, match=r"FastFlow needs zuko, .* pip install 'tarflow_fast\[flows\]' brings it$"):
        Family("zuko.FastFlow", "", ("vectors",)).load()


def test_a_seed_tells_the_weights() -> None:
    for name in FAMILIES:
        kinds = FAMILIES[name].kinds
        shape = (3,) if {"vectors", "sphere", "tokens"} & set(kinds) else (1, 8, 8)
        states = []
        for seed in (0, 0):
            torch.manual_seed(seed)
            states.append(build(name, data_shape=shape).state_dict())
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items()), name


def test_realnvp_sees_octaves_of_few_values_only() -> None:
    """They made the checkerboard sharp, and a table of 30 columns a thing to learn by heart."""
    for values, octaves, seen in ((2, {}, 2 * (1 + 2 * 4)), (3, {"octaves": 1}, 9), (4, {}, 4), (30, {}, 30)):
        network = build("realnvp", data_shape=(values,), couplings=1, actnorm=False, **octaves).get_submodule(
            "bijection.steps.0.network"
        )
        assert next(network.parameters()).shape == (64, seen)


IMAGE, SMALL, LARGE = (1, 8, 8), (2,), (100,)
IDLE = [
    ("realnvp", IMAGE, {"couplings": 4, "hidden": (8,), "octaves": 4}, ["couplings", "hidden", "octaves"]),
    ("realnvp", SMALL, {"scales": 2, "width": 8, "octaves": 4}, ["scales", "width"]),
    ("realnvp", LARGE, {"octaves": 4, "per_scale": 2, "blocks": 1}, ["octaves", "per_scale", "blocks"]),
    ("glow", IMAGE, {"steps": 2, "hidden": (8,), "depth": 1}, ["steps", "hidden"]),
    ("glow", SMALL, {"scales": 2, "depth": 2, "width": 8, "blocks": 1}, ["scales", "depth", "width", "blocks"]),
    ("flow-matching", IMAGE, {"width": 8, "octaves": 1, "noise": "gaussian"}, ["width", "octaves"]),
    ("rectified", SMALL, {"channels": 8, "noise": "gaussian"}, ["channels", "noise"]),
    ("cnf", SMALL, {"noise": "gaussian", "trace": "hutchinson"}, []),
    ("cnf", LARGE, {"noise": "gaussian", "trace": "exact"}, ["noise"]),
    ("riemannian", (3,), {"channels": 8}, ["channels"]),
    ("residual", SMALL, {"most_terms": 9, "probes": 2, "terms": 1}, ["most_terms", "probes"]),
    ("residual", LARGE, {"most_terms": 9, "probes": 2}, []),
]


@pytest.mark.parametrize(("name", "shape", "options", "idle"), IDLE, ids=str)
def test_an_option_that_does_nothing_for_the_data_is_refused_by_name(
    name: str, shape: tuple[int, ...], options: dict[str, Any], idle: list[str]
) -> None:
    """Also where its value is the default; what is left builds a model, which a file brings back."""
    needed = {key: options[key] for key in options if key not in idle}
    for key in idle:
        said = rf"^options: expected '{key}' with .* alone, as it does nothing for others, got data of shape "
        with pytest.raises(ArgumentError, match=said):
            build(name, data_shape=shape, **needed, **{key: options[key]})
    model = build(name, data_shape=shape, **needed)
    record = describe(model)
    assert rebuild(record).options == model.options


def test_every_option_does_something_for_some_data() -> None:
    """A name that `idle_options` gives is one of an option."""
    for name, family in FAMILIES.items():
        kind = family.load()
        known = set(describe_options(kind.Options))
        shapes = [(2,), (100,), (1, 8, 8)]
        idle = [set(kind.idle_options(shape, kind.Options())) for shape in shapes]
        assert set.union(*idle) <= known, name
        if len({DIMENSIONS[each] for each in family.kinds}) > 1:
            assert not set.intersection(*idle) - {"noise"}, name
