"""What families of flows learn: demonstrations by name, arrays of files, and what neither can be."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tarflow_fast.data import DEMONSTRATIONS, FlowData, load_flow_data
from tarflow_fast.data.demonstrations import BASES, MOTIF
from tarflow_fast.errors import ArgumentError, DataError

SHAPES = {"vectors": None, "images": (1, 8, 8), "tokens": (32,), "sphere": (3,), "torus": (2,)}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_a_demonstration_has_its_kind_and_a_held_out_half(name: str) -> None:
    train, test = load_flow_data(name), load_flow_data(name, split="test")
    assert train.kind == test.kind == DEMONSTRATIONS[name].kind
    assert train.shape == test.shape == (SHAPES[train.kind] or train.shape)
    assert len(train) > len(test) > 30
    assert train.vocabulary == test.vocabulary or train.kind != "tokens"
    assert train.fingerprint == load_flow_data(name).fingerprint
    rows = {row.tobytes() for row in train.values[:2000].numpy()}
    seen = sum(row.tobytes() in rows for row in test.values.numpy())
    assert seen <= len(test) // 10


def test_points_lie_where_they_should() -> None:
    sphere, torus, board = (load_flow_data(name).values for name in ("sphere", "torus", "checkerboard"))
    assert float((sphere.norm(dim=1) - 1).abs().max()) < 1e-6
    assert 0 <= float(torus.min()) < float(torus.max()) < 2 * math.pi + 1e-6
    assert bool(((board.floor().sum(1) % 2) == 0).all())


def test_every_chain_of_bases_has_the_motif() -> None:
    found = load_flow_data("dna", split="test")
    assert found.symbols == tuple(BASES)
    assert all(MOTIF in "".join(BASES[i] for i in row) for row in found.values.tolist())


def test_tables_are_on_a_standard_scale() -> None:
    train = load_flow_data("wine")
    assert float(train.values.mean(0).abs().max()) < 1e-5
    assert float((train.values.std(0, correction=0) - 1).abs().max()) < 1e-5
    assert (train.num_classes, train.class_names) == (3, ("class_0", "class_1", "class_2"))


def test_arrays_of_two_dimensions_are_vectors_or_tokens(tmp_path: Path) -> None:
    floats, integers = np.random.default_rng(0).normal(size=(6, 3)), np.arange(12).reshape(4, 3)
    np.save(tmp_path / "v.npy", floats)
    np.savez(tmp_path / "t.npz", x_train=integers, y_train=np.array([0, 1, 0, 1]), x_test=integers[:2])
    vectors, tokens = load_flow_data(tmp_path / "v.npy"), load_flow_data(tmp_path / "t.npz")
    assert (vectors.kind, vectors.values.dtype, vectors.shape) == ("vectors", torch.float32, (3,))
    assert (tokens.kind, tokens.values.dtype, tokens.vocabulary, tokens.num_classes) == ("tokens", torch.int64, 12, 2)
    assert len(load_flow_data(tmp_path / "t.npz", split="test")) == 2
    assert len(tokens.spread(3)) == 3


def test_images_of_files_are_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4) % 2)
    found = load_flow_data(tmp_path / "p.npz")
    assert (found.kind, found.shape, found.levels, found.num_classes) == ("images", (1, 8, 8), True, 2)


def test_points_off_the_manifold_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.full((4, 3), 0.6))
    with pytest.raises(ArgumentError, match=r"^data: expected points of norm 1 on the sphere, got .* off by 0\.0392$"):
        load_flow_data(tmp_path / "v.npy", manifold="sphere")


def test_what_is_no_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'moon': no such file, folder or demonstration; these are moons, rings"):
        load_flow_data("moon")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="not a whole file of plain arrays"):
        load_flow_data(tmp_path / "broken.npy")
    np.save(tmp_path / "nan.npy", np.full((4, 3), np.nan))
    with pytest.raises(ArgumentError, match=r"^data: expected finite values"):
        load_flow_data(tmp_path / "nan.npy")
    with pytest.raises(ArgumentError, match=r"^data: expected tokens >= 0, got -1$"):
        FlowData(torch.tensor([[0, -1]]), "tokens")
    with pytest.raises(ArgumentError, match=r"^data: expected vectors of 2 dimensions"):
        FlowData(torch.zeros(3), "vectors")


def test_labels_that_a_model_does_not_have_are_refused() -> None:
    data = FlowData(torch.zeros(3, 2), "vectors", torch.tensor([0, 1, 2]), ("a", "b", "c"))
    data.check_classes(3, ["a", "b", "c"])
    data.check_classes(3, None)
    with pytest.raises(ArgumentError, match=r"^data: expected labels below 2, as the model has them, got 2$"):
        data.check_classes(2, None)
    with pytest.raises(ArgumentError, match=r"^eval_data: expected the model's classes, \['b', 'a', 'c'\], got "):
        data.check_classes(3, ["b", "a", "c"], "eval_data")
    with pytest.raises(ArgumentError, match=r"^data: expected labels of 3 classes, got none$"):
        load_flow_data("checkerboard").check_classes(3, None)
