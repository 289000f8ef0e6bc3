"""A file of a model of a family tells how to build it; a broken one, or one of another kind, is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import tarflow_fast as tff
from tarflow_fast.errors import ArgumentError, CheckpointError
from tarflow_fast.flows import Preprocessed, build, is_family, load, save

HEADER = "tarflow_fast.flows"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save(build("nice", data_shape=(2,), num_classes=2, couplings=2, hidden=(4, 3)), path)
    return path


def rewritten(file: Path, header: dict[str, Any] | str | None = None, **weights: torch.Tensor) -> Path:
    """Rewrites a file with changes of its record, or another text in its place, and of its weights."""
    with safe_open(file, "pt") as found:
        tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
        record = json.loads(found.metadata()[HEADER])
    text = header if isinstance(header, str) else json.dumps({**record, **(header or {})})
    save_file({**tensors, **weights}, file, {HEADER: text})
    return file


def test_preprocessing_and_metadata_are_kept(tmp_path: Path) -> None:
    flow = build("nice", data_shape=(1, 2, 2), couplings=2, hidden=(4,))
    model = Preprocessed(flow, Preprocessed.Options("variational", alpha=0.01))
    model.standardise.fit(torch.randn(10, 1, 2, 2))
    model.metadata = {"class_names": ["a"], "steps": 3}
    save(model, tmp_path / "m.safetensors")
    found = load(tmp_path / "m.safetensors")
    assert isinstance(found, Preprocessed)
    assert (found.options, found.metadata, found.flow.options) == (model.options, model.metadata, flow.options)
    for key, value in model.state_dict().items():
        assert torch.equal(value, found.state_dict()[key]), key


def test_the_dtype_is_kept(tmp_path: Path) -> None:
    save(build("nice", data_shape=(2,)).double(), tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").place.dtype == torch.float64


def test_each_loader_tells_the_other_kind(file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no TarFlow, but .* tarflow_fast\.flows\.load reads$"):
        tff.load(file)
    tff.save(tff.load_pretrained(), tmp_path / "tarflow.safetensors")
    with pytest.raises(CheckpointError, match="no model of a family"):
        load(tmp_path / "tarflow.safetensors")
    assert is_family(file)
    assert not is_family(tmp_path / "tarflow.safetensors")
    assert not is_family(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices must be"),
        ({"family": "glew"}, "name: expected one of nice"),
        ({"options": {"depth": 3}}, "options: expected one of couplings, hidden for 'nice', got 'depth'"),
        ({"options": {"couplings": 3}}, "state_dict"),
        ({"data_shape": [2, 2]}, "data_shape: expected"),
        ({"preprocessing": {"alpha": 3}}, "alpha: expected"),
    ],
)
def test_a_wrong_record_is_refused(file: Path, header: dict[str, Any] | str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        load(rewritten(file, header))


def test_weights_that_are_not_finite_are_refused(file: Path) -> None:
    broken = rewritten(file, **{"bijection.steps.2.log_scale": torch.tensor([0.0, torch.nan])})
    with pytest.raises(CheckpointError, match=r"bijection\.steps\.2\.log_scale is not finite$"):
        load(broken)
    model = build("nice", data_shape=(2,))
    with torch.no_grad():
        next(model.parameters()).fill_(torch.inf)
    with pytest.raises(ArgumentError, match=r"^model: expected finite weights, got bijection"):
        save(model, file)


def test_a_truncated_file_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=str(file)):
        load(file)
    with pytest.raises(CheckpointError, match=r"no such file$"):
        load(file.with_name("other.safetensors"))


def test_only_models_of_build_are_saved(file: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^model: expected a model of tarflow_fast\.flows\.build, got Linear$"):
        save(torch.nn.Linear(1, 1), file)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^path: "):
        save(build("nice", data_shape=(2,)), file.with_suffix(".pth"))
