"""Checkpoints as training code writes them: the model's weights are found, and what was taken is said."""

from __future__ import annotations

import argparse
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_model
from torch import Tensor, nn

import tarflow_fast as tff
from tarflow_fast.errors import ArgumentError, CheckpointError, TarFlowWarning
from tarflow_fast.models.tarflow import TarFlow

SIZES: dict[str, Any] = {"in_channels": 3, "img_size": 4, "num_classes": 2}
State = dict[str, Tensor]


def model(seed: int = 0) -> TarFlow:
    return random_model(seed, **SIZES)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


def prefixed(prefix: str, seed: int = 0) -> State:
    return {prefix + key: value for key, value in model(seed).state_dict().items()}


class Wrapper(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.flow = model(seed)
        self.head = nn.Linear(2, 2)


class Settings(dict[str, Any]):
    pass


ONE: dict[str, Callable[[], Any]] = {
    "bare": lambda: model().state_dict(),
    "numbers beside": lambda: {**model().state_dict(), "epoch": 3, "name": "x"},
    **{
        name: lambda name=name: prefixed(name) for name in ("net.", "flow.", "ema_model.", "a.b.c.", "_orig_mod.model.")
    },
    "model_state_dict": lambda: {"model_state_dict": model().state_dict(), "optimizer_state_dict": {"state": {}}},
    "ema": lambda: {"ema": model().state_dict()},
    "nested": lambda: {"trainer": {"models": {"net": prefixed("module.")}}},
    "compiled blocks": lambda: {
        "module." + k.replace("blocks.0.", "blocks.0._orig_mod.").replace("mlp.", "_checkpoint_wrapped_module.mlp."): v
        for k, v in model().state_dict().items()
    },
    "a dict of its own class": lambda: {"state": Settings(model().state_dict())},
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(model()).state_dict(),
    "averaged and compiled": lambda: {"ema": {"n_averaged": torch.tensor(3), **prefixed("module._orig_mod.")}},
    "wrapper": lambda: Wrapper().state_dict(),
    "parameters": lambda: dict(model().state_dict(keep_vars=True)),
    "Lightning": lambda: {
        "state_dict": {**prefixed("model."), "loss.weight": torch.ones(3)},
        "epoch": 1,
        "pytorch-lightning_version": "2.4.0",
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_path": Path("x.ckpt")}},
        "hyper_parameters": argparse.Namespace(patch_size=2, noise_std=0.1),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"params": [0]}]}],
        "loops": {"fit_loop": {"state_dict": {}}},
    },
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ONE)
def test_one_set_of_weights_loads_whatever_wraps_it(tmp_path: Path, name: str, legacy: bool) -> None:
    torch.save(ONE[name](), tmp_path / "m.ckpt", _use_new_zipfile_serialization=not legacy)
    assert same(tff.load(tmp_path / "m.ckpt"), model())


TWO: dict[str, tuple[Callable[[], Any], str, str]] = {  # content, the average's name, the other's
    "ema beside model": (lambda: {"model": model(1).state_dict(), "ema": model(2).state_dict()}, "ema", "model"),
    "inside bare": (lambda: {**model(1).state_dict(), "ema": prefixed("module.", 2)}, "ema", "model"),
    "lucidrains": (
        lambda: {"step": torch.tensor(1), **prefixed("online_model.", 1), **prefixed("ema_model.", 2)},
        "ema_model",
        "online_model",
    ),
    "Lightning": (
        lambda: {"state_dict": {**prefixed("net.", 1), **prefixed("net_ema.module.", 2)}},
        "net_ema",
        "net",
    ),
    "parameters alone": (
        lambda: {"model": model(1).state_dict(), "ema": dict(model(2).named_parameters())},
        "ema",
        "model",
    ),
    "LitEma": (
        lambda: {
            **prefixed("model.", 1),
            **{"model_ema." + k.replace(".", ""): v for k, v in model(2).named_parameters()},
            "model_ema.decay": torch.tensor(0.999),
        },
        "model_ema",
        "model",
    ),
}


@pytest.mark.parametrize("name", TWO)
def test_of_two_sets_the_average_is_taken_and_said(tmp_path: Path, name: str) -> None:
    content, average, other = TWO[name]
    torch.save(content(), tmp_path / "m.pth")
    with pytest.warns(TarFlowWarning) as said:
        loaded = tff.load(tmp_path / "m.pth")
    assert same(loaded, model(2))
    assert loaded.origin is not None
    assert loaded.origin.weights == average
    (warning,) = said
    assert f"its weights '{average}' were taken, not '{other}'; weights='{other}'" in str(warning.message)
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for choice, seed in (("ema", 2), (average, 2), ("model", 1), (other, 1)):
            assert same(tff.load(tmp_path / "m.pth", weights=choice), model(seed))
    with pytest.raises(ArgumentError, match=r"^weights: expected a set of weights that the file holds \('"):
        tff.load(tmp_path / "m.pth", weights="best")
    with pytest.raises(ArgumentError, match="weights: expected the name"):
        tff.load(tmp_path / "m.pth", weights=3)  # type: ignore[arg-type]


def test_where_there_is_no_telling_the_file_is_refused(tmp_path: Path) -> None:
    torch.save({"best": model(1).state_dict(), "last": model(2).state_dict()}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"several sets of weights, 'best', 'last'; choose one by weights$"):
        tff.load(tmp_path / "m.pth")
    assert same(tff.load(tmp_path / "m.pth", weights="last"), model(2))
    torch.save({f"ema_{d}": model(s).state_dict() for s, d in ((1, "0.99"), (2, "0.999"))}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="several sets"):
        tff.load(tmp_path / "m.pth")
    assert same(tff.load(tmp_path / "m.pth", weights="ema_0.999"), model(2))


def test_an_average_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    shadow = {"decay": 0.999, "shadow_params": list(model(2).parameters())}
    torch.save({"model": model(1).state_dict(), "ema": shadow}, tmp_path / "m.pth")
    with pytest.warns(TarFlowWarning, match="'model' were taken; what it holds as ema is no whole state dict"):
        assert same(tff.load(tmp_path / "m.pth"), model(1))


def test_what_is_no_tarflow_says_what_was_found_in_one_line(tmp_path: Path) -> None:
    contents: dict[str, tuple[Any, str]] = {
        "another model": (nn.Linear(2, 3).state_dict(), "Keys found: weight, bias. "),
        "nested": (
            {"model": {"enc.w": torch.ones(1)}, "epoch": 1},
            r"Keys found: model, epoch \(in 'model: enc.w'|model: enc",
        ),
        "whole module": (
            model(),
            r"whole module, tarflow_fast.models.tarflow.TarFlow, .* not run: load it by torch.load\(…, weights_only="
            r"False\) in the version of tarflow_fast that wrote it, and save model by tarflow_fast.save\(model, ",
        ),
        "whole module inside": (
            {"model": Wrapper(), "epoch": 1},
            f"its model is a whole module, {__name__}.Wrapper",
        ),
        "list": ([1, 2], "got list"),
        "escapes": ({"\x1b[31mred\n": torch.ones(1)}, r"Keys found: '\\x1b\[31mred\\n'"),
        "long": ({"k" * 5000: torch.ones(1)}, "…"),
        "array": ({"var": __import__("numpy").ones(3)}, "objects .numpy"),
    }
    for name, (content, says) in contents.items():
        torch.save(content, tmp_path / "m.pth")
        with pytest.raises(CheckpointError, match=says) as caught:
            tff.load(tmp_path / "m.pth")
        text = str(caught.value)
        assert text.isprintable(), name
        assert len(text) < 700, name


@pytest.mark.parametrize("inside", [False, True])
def test_whole_objects_of_another_version_are_said_to_be_that(tmp_path: Path, inside: bool) -> None:
    """Modules have moved since. None of their names is imported."""
    for made, kind, name in (
        (model(), "module", "models.tarflow.TarFlow"),
        (tff.Sampler(model()), "sampler", "sampling.sampler.Sampler"),
    ):
        torch.save({"it": made} if inside else made, tmp_path / "now.pth")
        there, _, member = name.rpartition(".")
        gone = there[:-1] + "x"
        with zipfile.ZipFile(tmp_path / "now.pth") as now, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
            for entry in now.infolist():
                old.writestr(entry.filename, now.read(entry).replace(f"fast.{there}".encode(), f"fast.{gone}".encode()))
        with pytest.raises(CheckpointError) as caught:
            tff.load(tmp_path / "old.pth")
        text = str(caught.value)
        start = "its it is a" if inside else "a"
        assert f"{start} whole {kind}, tarflow_fast.{gone}.{member}, pickled with its code, which is not run: " in text
        assert f"wrote it (this one, {tff.__version__}, has no module tarflow_fast.{gone}), and save " in text
        assert text.endswith(" by tarflow_fast.save(model, 'model.safetensors')")
        with pytest.raises(CheckpointError, match="that wrote it, and save"):
            tff.load(tmp_path / "now.pth")


def test_classes_that_are_not_there_do_not_matter(tmp_path: Path) -> None:
    """Settings may be of classes that this machine has not, and nothing of them is imported or called."""
    module = types.ModuleType("their_project")
    exec("class Config(dict):\n  def __init__(self, **k): super().__init__(**k); self.x = self", module.__dict__)
    sys.modules["their_project"] = module
    try:
        torch.save({"state_dict": prefixed("model."), "hparams": module.Config(noise_std=0.3)}, tmp_path / "m.ckpt")
    finally:
        del sys.modules["their_project"]
    loaded = tff.load(tmp_path / "m.ckpt")
    assert same(loaded, model())
    assert loaded.metadata == {"noise_type": "gaussian", "noise_std": 0.3}
    assert "their_project" not in sys.modules


@pytest.mark.parametrize("key", ["hyper_parameters", "args", "config"])
def test_settings_beside_the_weights_tell_what_these_leave_open(tmp_path: Path, key: str) -> None:
    theirs = random_model(in_channels=12, img_size=6, patch_size=2, head_dim=16, num_classes=2)
    settings = {"patch_size": 2, "head_dim": 16, "noise_std": 0.2, "class_names": ["a", "b"], "lr": 1e-4}
    torch.save({"state_dict": theirs.state_dict(), key: settings}, tmp_path / "m.ckpt")
    loaded = tff.load(tmp_path / "m.ckpt")
    assert loaded.config == theirs.config
    assert loaded.metadata == {"noise_type": "gaussian", "noise_std": 0.2, "class_names": ["a", "b"]}
    torch.save({"state_dict": theirs.state_dict(), key: {"patch_size": 7, "noise_std": -1.0}}, tmp_path / "m.ckpt")
    assert tff.load(tmp_path / "m.ckpt").config.patch_size == 4  # a setting of something else
    assert tff.load(tmp_path / "m.ckpt").metadata == {}


@pytest.mark.parametrize(
    "wrapped", [Wrapper, lambda: torch.optim.swa_utils.AveragedModel(model()), lambda: nn.Sequential(model())]
)
def test_accelerate_finds_a_model_in_a_module(wrapped: Callable[[], nn.Module]) -> None:
    z = torch.randn(2, 4, 12)
    fast = tff.accelerate(wrapped(), solver="sequential")
    assert torch.equal(
        fast.reverse(z, torch.tensor([0, 1])),
        tff.Sampler(model(), solver="sequential").reverse(z, torch.tensor([0, 1])),
    )


def test_accelerate_takes_patch_and_heads_from_within() -> None:
    module = nn.ModuleDict({"net": random_model(in_channels=12, img_size=6, patch_size=2, head_dim=16)})
    z = torch.randn(1, 9, 48)
    fast, slow = tff.accelerate(module, solver="sequential"), tff.Sampler(module["net"], solver="sequential")  # type: ignore[arg-type]
    assert torch.equal(fast.reverse(z), slow.reverse(z))


def test_order_does_not_matter(tmp_path: Path) -> None:
    torch.save(OrderedDict(reversed(list(prefixed("net.").items()))), tmp_path / "m.pth")
    assert same(tff.load(tmp_path / "m.pth"), model())
