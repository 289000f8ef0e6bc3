"""Files that claim more than they hold, or are of another kind, are one error, at once and in little memory."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import refused, same, small
from safetensors.torch import save_file
from torch import Tensor

import tarflow_fast as tff
from tarflow_fast.errors import ArgumentError, CheckpointError


def attack(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    state: dict[str, Any] = dict(small().state_dict())
    change(state)
    return state


def repeated(*shape: int) -> Tensor:
    return torch.ones(1).expand(shape)


def shared(state: dict[str, Any]) -> None:
    """A thousand blocks whose tensors are views of one block's."""
    block = {key[9:]: value for key, value in state.items() if key.startswith("blocks.0.")}
    state |= {f"blocks.{k}.{key}": value for k in range(1000) for key, value in block.items()}


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "block number": (lambda s: s.update({"blocks.1000000.x": torch.zeros(1)}), "numbered with gaps"),
    "layer number": (lambda s: s.update({"blocks.0.attn_blocks.1000000.x": torch.zeros(1)}), "numbered with gaps"),
    "digits": (lambda s: s.update({f"blocks.{'9' * 5000}.x": torch.zeros(1)}), "numbered with gaps"),
    "another 1": (lambda s: s.update({"blocks.01.x": torch.zeros(1)}), "numbered with gaps"),
    "rows": (lambda s: s.update({"blocks.1.pos_embed": repeated(10**9, 64)}), "repeats fewer values"),
    "square of rows": (
        lambda s: s.update(
            {"var": repeated(10**10, 12)} | {f"blocks.{k}.pos_embed": repeated(10**10, 64) for k in (0, 1)}
        ),
        "repeats fewer values",
    ),
    "classes": (lambda s: s.update({f"blocks.{k}.class_embed": repeated(10**12, 1, 64) for k in (0, 1)}), "repeats"),
    "width": (lambda s: s.update({"blocks.0.proj_in.weight": repeated(2**40, 12)}), "repeats"),
    "empty": (lambda s: s.update({"blocks.0.class_embed": torch.ones(2**40, 1, 0)}), "class_embed: empty"),
    "shared": (shared, "share their values"),
    "no dimensions": (lambda s: s.update({"blocks.0.class_embed": torch.tensor(1.0)}), "class_embed: expected"),
    "sparse": (lambda s: s.update(var=s["var"].to_sparse()), "var: expected a state dict"),
    "meta": (lambda s: s.update(var=s["var"].to("meta")), "var: expected a state dict"),
    "float8": (lambda s: s.update(var=s["var"].to(torch.float8_e4m3fn)), "got float8_e4m3fn"),
    "complex": (lambda s: s.update(var=s["var"].to(torch.complex64)), "floating-point weights"),
    "quantised": (lambda s: s.update(var=torch.quantize_per_tensor(s["var"], 1.0, 0, torch.qint8)), "expected a state"),
    "beyond fp32": (
        lambda s: s.update(var=s["var"].double() * 1e300),
        r"var: expected weights up to 3.4e\+38 for float32",
    ),
    "many sets": (
        lambda s: s.update({f"m{i}.blocks.0.proj_in.weight": torch.ones(1) for i in range(1000)}),
        "more than 64",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_small_files_that_claim_much(tmp_path: Path, name: str, legacy: bool) -> None:
    change, says = ATTACKS[name]
    torch.save(attack(change), tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "m.pth", says)


def test_a_mask_much_larger_than_the_model(tmp_path: Path) -> None:
    T, model = 150**2, tff.TarFlow(1, 1, 1, 2, 1, 1, head_dim=1)
    state = {**model.state_dict(), "var": torch.ones(T, 1), "blocks.0.pos_embed": torch.ones(T, 2)}
    del state["blocks.0.attn_mask"]
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="22500 tokens are too many for a model of"):
        tff.load(tmp_path / "m.pth", head_dim=1)


def zipped(path: Path, change: Callable[[str, bytes], bytes], **options: Any) -> None:
    torch.save(small().state_dict(), path)
    with zipfile.ZipFile(path) as old:
        entries = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", **options) as new:
        for name, data in entries.items():
            new.writestr(name, change(name, data))


def test_zip_archives_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    zipped(path, lambda name, data: data)
    assert same(tff.load(path), small())  # a zip as good as torch's
    bomb = bytes(2**28)
    zipped(path, lambda name, data: bomb if name.endswith("data/0") else data, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1e6
    refused(path, "claims more than it holds")
    zipped(path, lambda name, data: data[:8] if name.endswith("data/0") else data)
    refused(path, "claims more values than the file holds")
    zipped(path, lambda name, data: data.replace(b"little", b"big") if name.endswith("byteorder") else data)
    refused(path, "another byte order")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.npy", "x")
    refused(path, "a zip archive that torch.save did not write")
    np.savez(tmp_path / "m.npz", a=np.ones(3))
    refused(tmp_path / "m.npz", "a zip archive that torch.save did not write")


def test_a_flipped_bit_of_a_weight_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save(small().state_dict(), path)
    content = bytearray(path.read_bytes())
    at = content.find(small().state_dict()["blocks.1.proj_in.weight"].numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    refused(path, "blocks.1.proj_in.weight: damaged: a checksum differs")


def op(code: bytes, value: int = 0, size: int = 0) -> bytes:
    return code + value.to_bytes(size, "little")


PICKLES = {
    "memo": b"\x80\x02}" + op(b"r", 2**32 - 1, 4) + b".",
    "bytes": b"\x80\x04" + op(b"\x8e", 2**62, 8) + b"x.",
    "bytearray": b"\x80\x05" + op(b"\x96", 2**62, 8) + b"x.",
    "text": b"\x80\x04" + op(b"\x8d", 2**40, 8) + b"x.",
    "frame": b"\x80\x04" + op(b"\x95", 2**62, 8) + b"}.",
    "key to hash": b"\x80\x02}N" + b"2\x86" * 5000 + b"K\x01s.",
    "doubled lists": b"\x80\x02}X\x01\x00\x00\x00a](" + b"e(".join([b"2"] * 50) + b"es.",
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep dicts": b"\x80\x02" + b"}K\x01" * 100_000 + b"}" + b"s" * 100_000 + b".",
    "call": b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
    "exec": b"cbuiltins\nexec\n(Vraise SystemExit\ntR.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"\x80\x02Pabc\n.",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "empty stack": b"\x80\x02ss.",
    "no end": b"\x80\x02}",
    "only": b"\x80",
    "build": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.",
}


@pytest.mark.parametrize("zipped_", [False, True])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_claim_much_or_are_none(tmp_path: Path, name: str, zipped_: bool) -> None:
    path = tmp_path / "m.pth"
    if zipped_:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("m/data.pkl", PICKLES[name])
    else:
        path.write_bytes(PICKLES[name])
    refused(path)


def test_safetensors_headers_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    entry = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}
    for header in ({"blocks.0.proj_in.weight": entry}, {"a": 3}, [], {"__metadata__": {"a": 1}}):
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        refused(path)
        for length in (2**63, 2**40, 10**8, len(text) + 5, 1, 0):
            path.write_bytes(struct.pack("<Q", length) + text + bytes(4))
            refused(path)
    save_file(small().state_dict(), path, {"tarflow_fast": "[" * 100_000})
    refused(path, "is not JSON")
    save_file(small().state_dict(), path, {"tarflow_fast": '{"config": {"head_dim": 64}}'})
    refused(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x1f\x8b\x08rest", "gzip"),
        (b"no checkpoint at all", "does not begin as one"),
        (b"PK\x03\x04 and no more", "not a readable weights-only .pth file"),
        (pickle.dumps({"a": 1}), "not a TarFlow"),
        (pickle.dumps(OSError("x")), "not made"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt", ""])
def test_files_of_other_kinds(tmp_path: Path, content: bytes, says: str, suffix: str) -> None:
    (tmp_path / f"m{suffix}").write_bytes(content)
    refused(tmp_path / f"m{suffix}", says)


def test_a_suffix_says_nothing(tmp_path: Path) -> None:
    tff.save(small(), tmp_path / "m.safetensors")
    (tmp_path / "m.pt").write_bytes((tmp_path / "m.safetensors").read_bytes())
    assert same(tff.load(tmp_path / "m.pt"), small())
    torch.save(small().state_dict(), tmp_path / "m")
    assert same(tff.load(tmp_path / "m"), small())


def test_a_safetensors_header_of_any_length_is_known_as_one(tmp_path: Path) -> None:
    """Its first bytes are its length, and may be those with which pickles, zips and web pages begin."""
    path = tmp_path / "m.safetensors"
    seen = set()
    for n in range(6, 18):
        model = small()
        model.metadata = {"x": "x" * (8 * n)}  # headers are padded to eights
        tff.save(model, path)
        seen.add(path.read_bytes()[0])
        assert tff.load(path).metadata == model.metadata
    assert {0x80, 0x50} <= seen


def test_other_arguments_than_paths(tmp_path: Path) -> None:
    for path in (None, 3, b"m.pth", small()):
        with pytest.raises(ArgumentError, match=r"^path: expected the path of a file"):
            tff.load(path)  # type: ignore[arg-type]
    for text in ("m\0.pth", "", str(tmp_path / "none.pth")):
        with pytest.raises(CheckpointError):
            tff.load(text)
    with pytest.raises(CheckpointError, match=r"a folder, and no such file in it as model\.safetensors"):
        tff.load(tmp_path)
    with pytest.raises(ArgumentError, match=r"model: expected a TarFlow \(save takes the model first.*, got str"):
        tff.save(str(tmp_path / "x.pth"), small())  # type: ignore[arg-type]
    for dtype in (torch.int8, torch.complex64, torch.float8_e5m2, "float32"):
        with pytest.raises(ArgumentError, match=r"dtype: expected one of torch\.float16"):
            tff.save(small(), tmp_path / "x.pth", dtype=dtype)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.pth")
    refused(tmp_path / "m.pth", "not a regular file")
