"""The folder in which choices and verdicts are kept between processes: small files of JSON, written whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import replacing

CACHE_VARIABLE = "TARFLOW_FAST_CACHE"


def cache_folder() -> Path:
    """Returns $TARFLOW_FAST_CACHE, or else the folder tarflow_fast in $XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tarflow_fast"


def cache_path(kind: str, key: Mapping[str, Any]) -> Path:
    """Returns the file of what depends on all values of `key`. kind: the folder that such files lie in."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / kind / f"{digest}.json"


def read_json(path: Path) -> Any:
    """Returns what the file holds, or None where there is none or it cannot be understood, as one that was cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Put the content into the file, all at once, so that another process never reads half of it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
