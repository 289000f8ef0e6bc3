"""Model cards: what they tell, and that those of one's own are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import random_model
from hubs import model

import tarflow_fast as tff
from tarflow_fast.checkpoints.card import CARD, model_card
from tarflow_fast.errors import ArgumentError


def test_a_card_tells_what_the_model_records(tmp_path: Path) -> None:
    text = tff.model_card(model())
    assert text.startswith("---\n" + CARD)
    for part in ("class-conditional", "3 × 4 × 4", "σ = 0.1", '"a", "b"', "labels=[0, 1], denoise=True"):
        assert part in text
    plain = model_card(random_model())
    assert "unconditional" in plain
    assert "not recorded" in plain
    assert "denoise=True" not in plain


def test_a_card_of_ones_own_is_written_again_and_a_readme_is_kept(tmp_path: Path) -> None:
    readme, path = tmp_path / "README.md", tmp_path / "m.safetensors"
    for text in ("one\n", "one\n", "two", model_card(model()), "three"):
        tff.save(model(), path, card=text)
        assert readme.read_bytes() == text.encode()
    tff.save(model(), tmp_path / "m.pth", card="three")  # the same text loses nothing
    readme.write_text("three, and notes")
    for card in (True, "four"):
        with pytest.raises(ArgumentError, match=r"^card: expected no README.md of another kind"):
            tff.save(model(), path, card=card)
    path.write_bytes(b"no model")
    with pytest.raises(ArgumentError, match=r"^card: expected no README.md of another kind"):
        tff.save(model(), path, card="four")
    assert readme.read_text() == "three, and notes"
    assert path.read_bytes() == b"no model"


def test_a_card_that_cannot_be_written_is_said_before_the_weights_are(tmp_path: Path) -> None:
    named = model()
    named.metadata["class_names"] = ["a", "\ud800"]
    for given, card in ((model(), "a\udc80b"), (named, True)):
        with pytest.raises(ArgumentError, match=r"^card: expected text that UTF-8 can hold, got '\\ud[c8][08]0'$"):
            tff.save(given, tmp_path / "m.safetensors", card=card)
        assert not list(tmp_path.glob("m.*"))


def test_save_writes_a_card_beside_and_keeps_another(tmp_path: Path) -> None:
    tff.save(model(), tmp_path / "m.safetensors", card=True)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == model_card(model())
    tff.save(model(), tmp_path / "m.safetensors", card=CARD + " mine")
    tff.save(model(), tmp_path / "m.safetensors", card=True)
    (tmp_path / "README.md").write_text("a project's")
    (tmp_path / "m.safetensors").unlink()
    with pytest.raises(ArgumentError, match=r"^card: expected no README.md of another kind"):
        tff.save(model(), tmp_path / "m.safetensors", card=True)
    with pytest.raises(ArgumentError, match=r"^card: expected a bool"):
        tff.save(model(), tmp_path / "m.safetensors", card=3)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "a project's"
