"""Checkpoints: what is written comes back, ml-tarflow's files load, and nothing else does."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GOLDEN as CASES
from cases import Case, random_images, random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tolerances import GOLDEN, assert_close

from tarflow_fast.adapters import accelerate
from tarflow_fast.checkpoints import load, save
from tarflow_fast.errors import ArgumentError, CheckpointError, TarFlowWarning
from tarflow_fast.models.config import TarFlowConfig
from tarflow_fast.models.tarflow import TarFlow
from tarflow_fast.sampling.sampler import Sampler

SIZES: list[dict[str, Any]] = [
    {},
    {"num_classes": 3, "num_blocks": 3, "layers_per_block": 2},
    {"nvp": False},
    {"in_channels": 3, "img_size": 12, "patch_size": 4},
    {"in_channels": 1, "img_size": 6, "patch_size": 6, "channels": 128},
]


def same(a: TarFlow, b: TarFlow) -> None:
    assert a.config == b.config
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip(tmp_path: Path, sizes: dict[str, Any], suffix: str) -> None:
    model = random_model(1, **sizes)
    model.metadata = {"noise_std": 0.05, "class_names": ["ä", "b", "c"][: model.config.num_classes]}
    save(model, tmp_path / f"m{suffix}")
    back = load(tmp_path / f"m{suffix}")
    same(model, back)
    assert back.metadata == (model.metadata if suffix == ".safetensors" else {})
    assert all(p.requires_grad for p in back.parameters())
    assert list(tmp_path.iterdir()) == [tmp_path / f"m{suffix}"]
    (tmp_path / "plain").touch()
    assert (tmp_path / f"m{suffix}").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_published_checkpoints_load_and_ours_are_theirs(tmp_path: Path, case: Case) -> None:
    """A .pth of the published code gives its results; what we write has its keys, shapes and dtypes."""
    torch.save(case.weights, tmp_path / "theirs.pth")
    model = load(tmp_path / "theirs.pth")
    assert model.config == case.model().config
    with torch.no_grad():
        assert_close(model(case.tensor("in.image"), case.y)[0], case.tensor("out.forward_z"), GOLDEN)
    save(model, tmp_path / "ours.pth")
    ours = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in case.weights.items()}
    assert all(torch.equal(ours[k], v) for k, v in case.weights.items())


def test_what_weights_cannot_tell_is_recorded_or_given(tmp_path: Path) -> None:
    sizes = {"in_channels": 12, "img_size": 6, "patch_size": 2, "head_dim": 16}  # 48 values look like 3 · 4²
    model = random_model(**sizes)
    save(model, tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").config == model.config
    with pytest.warns(TarFlowWarning, match="load it with patch_size=2, head_dim=16, or save as .safetensors"):
        save(model, tmp_path / "m.pth")
    assert load(tmp_path / "m.pth").config == TarFlowConfig(3, 12, 4, 64, 2, 1)
    assert load(tmp_path / "m.pth", patch_size=2, head_dim=16).config == model.config
    assert load(tmp_path / "m.pth", in_channels=12, head_dim=16).config == model.config
    with pytest.raises(ArgumentError, match="patch_size: expected a patch size whose square divides"):
        load(tmp_path / "m.pth", patch_size=5)
    with pytest.raises(ArgumentError, match="in_channels: expected 12 with patch_size 2"):
        load(tmp_path / "m.pth", patch_size=2, in_channels=3)
    with pytest.raises(CheckpointError, match="channels: expected a multiple of head_dim = 7, got 64"):
        load(tmp_path / "m.pth", head_dim=7)
    with pytest.raises(ArgumentError, match="head_dim: expected an integer >= 1, got 0"):
        load(tmp_path / "m.pth", head_dim=0)


def test_published_file_names_tell_patch_and_noise(tmp_path: Path) -> None:
    model = random_model(in_channels=12, img_size=6, patch_size=2)
    for name, metadata in (
        ("afhq_model_2_64_2_1_0.07.pth", {"noise_type": "gaussian", "noise_std": 0.07}),
        ("imagenet64_model_2_64_2_1_uniform.pth", {"noise_type": "uniform"}),
    ):
        save(model, tmp_path / name)
        assert load(tmp_path / name).config == model.config
        assert load(tmp_path / name).metadata == metadata
    for end in (
        *(
            " (1)",
            "(2)",
            " (copy)",
            " (another copy)",
            " - Copy",
            " - Copy (2)",
            " copy 3",
            "-copy",
            "_ema",
            "_EMA_0.999",
        ),
        *("_best", "-epoch=12", "_step_1000", ".fp16", "_ema (1)", ".pth", "_ema_step_10-copy (3)"),
    ):
        for name, noise in (
            ("0.07", {"noise_type": "gaussian", "noise_std": 0.07}),
            ("uniform", {"noise_type": "uniform"}),
        ):
            file = tmp_path / f"afhq_model_2_64_2_1_{name}{end}.pth"
            save(model, file)
            assert load(file).config == model.config, end
            assert load(file).metadata == noise, end
            file.unlink()
    for end in ("_0.1", "_8_0.07", "_uniform", "_finetuned", "a5", "copy", "_x", " (a)", "_noise0.1", "_ema2x"):
        with pytest.warns(TarFlowWarning, match="load it with patch_size=2, or"):  # this may say something else
            save(model, tmp_path / f"x_model_2_64_2_1_0.07{end}.pth")
    with pytest.warns(TarFlowWarning, match="load it with patch_size=2, or"):
        save(model, tmp_path / "x_model_2_128_2_1_0.07.pth")  # another width: the name is not this model's
    assert load(tmp_path / "x_model_2_128_2_1_0.07.pth").config.patch_size == 4


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("outer", [None, "model", "state_dict"])
def test_wrapped_state_dicts_load(tmp_path: Path, prefix: str, outer: str | None) -> None:
    model = random_model()
    state: Any = OrderedDict((prefix + key, value) for key, value in model.state_dict().items())
    torch.save({outer: state, "epoch": 3} if outer else state, tmp_path / "m.pth")
    same(load(tmp_path / "m.pth"), model)


def test_storage_dtype(tmp_path: Path) -> None:
    model = random_model()
    save(model, tmp_path / "half.safetensors", dtype=torch.float16)
    back = load(tmp_path / "half.safetensors")
    assert back.dtype == torch.float32
    x = random_images(model, 2)
    with torch.no_grad():
        assert_close(back(x)[0], model(x)[0], 0.01)
    assert (tmp_path / "half.safetensors").stat().st_size < sum(p.nbytes for p in model.parameters()) * 0.6
    assert load(tmp_path / "half.safetensors", dtype=torch.bfloat16).dtype == torch.bfloat16
    with torch.no_grad():
        model.blocks[0].proj_in.weight[0, 0] = 1e6  # type: ignore[index, union-attr]
    with pytest.raises(ArgumentError, match="finite weights in float16"):
        save(model, tmp_path / "over.safetensors", dtype=torch.float16)
    assert not (tmp_path / "over.safetensors").exists()


def test_save_refuses_other_suffixes_and_broken_weights(tmp_path: Path) -> None:
    model = random_model()
    with pytest.raises(ArgumentError, match="suffix"):
        save(model, tmp_path / "m.bin")
    with torch.no_grad():
        model.var[0, 0] = torch.nan
    with pytest.raises(ArgumentError, match="model: expected finite weights, got var"):
        save(model, tmp_path / "m.pth")
    assert not list(tmp_path.iterdir())


# Files that are not a whole model


def broken(change: Any) -> dict[str, Any]:
    state: dict[str, Any] = dict(random_model(num_classes=2).state_dict())
    change(state)
    return state


def put(key: str, value: Any) -> Any:
    return lambda state: state.__setitem__(key, value)


BLOCK = "blocks.1.attn_blocks.0."
BROKEN = {
    "empty": (lambda state: state.clear(), "not a TarFlow"),
    "foreign": (lambda state: (state.clear(), state.update(weight=torch.ones(3))), "not a TarFlow"),
    "missing": (lambda state: state.pop(BLOCK + "mlp.main.2.bias"), "incomplete: 1 tensors are missing"),
    "missing block": (lambda state: [state.pop(k) for k in list(state) if k.startswith("blocks.0.")], "not a TarFlow"),
    "missing var": (lambda state: state.pop("var"), "incomplete"),
    "unknown": (put("blocks.0.extra", torch.ones(1)), "unknown tensors, blocks.0.extra"),
    "shape": (put(BLOCK + "attention.qkv.bias", torch.ones(7)), "expected shape .192,., got .7,."),
    "vector": (put("blocks.0.proj_in.weight", torch.ones(7)), "expected two dimensions"),
    "rows": (put("blocks.0.proj_out.weight", torch.ones(7, 64)), "expected 4 or 8 rows"),
    "tokens": (put("blocks.0.pos_embed", torch.ones(15, 64)), "15 tokens make no square; give img_size$"),
    "integer": (put("blocks.0.proj_in.bias", torch.ones(64, dtype=torch.int64)), "floating-point weights"),
    "nan": (put("blocks.0.proj_in.bias", torch.full((64,), torch.nan)), "finite weights"),
    "inf": (put("var", torch.full((16, 4), torch.inf)), "finite weights"),
    "var": (put("var", torch.zeros(16, 4)), "positive variances"),
    "not a tensor": (put("var", 3), "expected a state dict"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_state_dicts_are_refused(tmp_path: Path, name: str) -> None:
    change, says = BROKEN[name]
    torch.save(broken(change), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=says) as caught:
        load(tmp_path / "m.pth")
    assert "m.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_mask_is_no_loss(tmp_path: Path) -> None:
    state = broken(lambda state: [state.pop(key) for key in list(state) if key.endswith("attn_mask")])
    torch.save(state, tmp_path / "m.pth")
    same(load(tmp_path / "m.pth"), random_model(num_classes=2))


def with_mask(mask: Any) -> Any:
    return broken(lambda state: state.update({"blocks.1.attn_mask": mask}))


@pytest.mark.parametrize(
    "mask",
    [
        *(torch.ones(16, 16), torch.ones(16, 16).tril(-1), torch.ones(16, 16).triu(), torch.zeros(16, 16)),
        *(torch.ones(9, 9).tril(), torch.ones(1), torch.ones(1, 16, 16).tril(), torch.ones(1, 1).expand(16, 16)),
    ],
    ids=lambda mask: f"{tuple(mask.shape)} {int(mask.sum())}",
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_another_mask_than_the_causal_one_is_refused(tmp_path: Path, mask: Any, suffix: str) -> None:
    """Nothing here would look at it; so also that of a module, whatever else is checked of it."""
    state = with_mask(mask)
    path = tmp_path / f"m{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn_mask: "):
        load(path)
    if tuple(mask.shape) == (16, 16):
        model = random_model(num_classes=2)
        model.load_state_dict(state)
        for make in (Sampler, accelerate, partial(accelerate, check=False), lambda model: save(model, path)):
            with pytest.raises((CheckpointError, ArgumentError), match=r"blocks\.1\.attn_mask"):
                make(model)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float64])
def test_a_causal_mask_may_have_any_dtype_and_place(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save(with_mask(torch.ones(3, 16, 16).tril().to(dtype)[1]), tmp_path / "m.pth")
    same(load(tmp_path / "m.pth"), random_model(num_classes=2))
    torch.save(with_mask(torch.ones(16, 16).triu().to(dtype).T), tmp_path / "m.pth")
    same(load(tmp_path / "m.pth"), random_model(num_classes=2))


def test_a_mask_is_not_gathered_from_a_whole_file(tmp_path: Path) -> None:
    far = torch.zeros(16, 16, 1000)
    far[:, :, 0] = torch.ones(16, 16).tril()
    torch.save(with_mask(far[:, :, 0]), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn_mask: its values lie far apart"):
        load(tmp_path / "m.pth")


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("owned"),))


def test_no_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"var": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match="not a readable weights-only"):
            load(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "{",
        '{"config": 3}',
        '{"config": {"num_blocks": 5}}',
        '{"config": {"img_size": 99}}',
        '{"config": {"x": 1}}',
    ],
)
def test_headers_that_lie(tmp_path: Path, header: str) -> None:
    model = random_model()
    save_file(dict(model.state_dict()), tmp_path / "m.safetensors", {"tarflow_fast": header})
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        load(tmp_path / "m.safetensors")


def test_safetensors_of_another_origin_loads(tmp_path: Path) -> None:
    model = random_model()
    save_file(dict(model.state_dict()), tmp_path / "m.safetensors")
    same(load(tmp_path / "m.safetensors"), model)


def test_header_is_readable_json(tmp_path: Path) -> None:
    model = random_model()
    save(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["tarflow_fast"])["config"] == model.config.to_dict()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(suffix=st.sampled_from([".pth", ".safetensors"]), where=st.floats(0, 1), data=st.data())
def test_damaged_files_never_load_as_something_else(
    tmp_path: Path, suffix: str, where: float, data: st.DataObject
) -> None:
    """Truncated or with bytes changed: a named error, or (changed weight bytes) a whole model of the same sizes."""
    path = tmp_path / f"m{suffix}"
    model = random_model(img_size=4, num_classes=2)
    save(model, path)
    content = bytearray(path.read_bytes())
    at = int(where * (len(content) - 1))
    if data.draw(st.booleans()):
        del content[at:]
    else:
        noise = data.draw(st.binary(min_size=1, max_size=40))
        content[at : at + len(noise)] = noise
    path.write_bytes(bytes(content))
    try:
        back = load(path)
    except CheckpointError:
        return
    assert back.config.to_dict().keys() == model.config.to_dict().keys()
    assert all(torch.isfinite(value).all() for value in back.state_dict().values())
