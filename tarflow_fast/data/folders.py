"""These functions find which files of a folder are pictures, and of which class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from .classes import same_form
from .pictures import OTHER_PICTURES, PICTURES

HALVES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
MOST_NESTED = 16
MOST_LISTED = 3


@dataclass
class Pictures:
    """`Pictures` are those that were found in a folder.

    paths: the files, in the order of classes and names. labels: the class of each, or None without classes.
    class_names: the names of the classes, or None without classes. notes: sentences on what was decided.
    """

    paths: list[str] = field(default_factory=list)
    labels: list[int] | None = None
    class_names: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class _Listing:
    """A `_Listing` has the names of the sub-folders and the pictures of one folder."""

    folders: list[str]
    pictures: list[str]


class _Skipped:
    """A `_Skipped` counts files that are no pictures and folders that hold none."""

    def __init__(self) -> None:
        self.count = 0
        self.examples: list[str] = []

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.examples) < MOST_LISTED and name not in self.examples:
            self.examples.append(name)

    def __str__(self) -> str:
        return ", ".join(map(repr, self.examples)) + (", …" if self.count > len(self.examples) else "")


def _list(folder: str, skipped: _Skipped) -> _Listing:
    """Returns what a folder holds; whatever is hidden, of the system or no picture is counted as skipped."""
    found = _Listing([], [])
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder!r}: {error.strerror}") from error
    for entry in entries:
        name, suffix = entry.name, os.path.splitext(entry.name)[1].lower()
        if name.startswith(".") or (name.lower() in SYSTEM_FOLDERS and entry.is_dir()):
            skipped.add(name)
        elif entry.is_dir():
            found.folders.append(name)
        elif suffix in PICTURES and (entry.is_file() or entry.is_symlink()):  # a broken link fails when it is read
            found.pictures.append(name)
        elif suffix in OTHER_PICTURES:
            raise DataError(
                f"{entry.path!r}: a kind of picture that is not read; convert it to PNG or JPEG, or move it"
            )
        else:
            skipped.add(name)
    return found


def _walk(folder: str, skipped: _Skipped, above: tuple[str, ...] = ()) -> list[str]:
    """Returns all pictures in a folder and the folders in it."""
    real = os.path.realpath(folder)
    if real in above or len(above) >= MOST_NESTED:
        raise DataError(f"{folder!r}: folders in one another without end")
    found = _list(folder, skipped)
    paths = [os.path.join(folder, name) for name in found.pictures]
    for name in found.folders:
        paths += _walk(os.path.join(folder, name), skipped, (*above, real))
    return paths


def pick_half(names: Sequence[str], split: str) -> tuple[dict[str, list[str]], str]:
    """Returns names of halves of data, by half, and the half that serves as `split`: for "test" it may be "val"."""
    kinds = {half: [name for name in names if name.lower() in known] for half, known in HALVES.items()}
    kinds = {half: found for half, found in kinds.items() if found}
    return kinds, "val" if split == "test" and "test" not in kinds and "val" in kinds else split


def find_pictures(root: Path, split: str) -> Pictures:
    """Returns the pictures at `root`.

    The folder holds pictures, or a folder of them for each class, or halves (train, val, …) of such, or is wrapped
    around one of these. Raises DataError where it cannot be told what is meant.
    """
    result, skipped = Pictures(), _Skipped()
    folder = os.fspath(root)
    for _ in range(MOST_NESTED):
        found = _list(folder, skipped)
        kinds, half = pick_half(found.folders, split)
        others = [name for name in found.folders if not any(name in names for names in kinds.values())]
        if kinds and (not others or ("train" in kinds and len(kinds) > 1)):
            folder = _half(folder, kinds, half, split, found, others, result.notes)
            found = _list(folder, skipped)
            break
        inner = os.path.join(folder, found.folders[0]) if len(found.folders) == 1 and not found.pictures else None
        if inner is None:
            break
        inside = _list(inner, _Skipped())
        if inside.pictures or not inside.folders:
            break
        result.notes.append(f"{inner!r} is the only folder in {folder!r}: what it holds is taken")
        folder = inner
    _take_classes(folder, found, result, skipped)
    if skipped.count:
        plural = "s" if skipped.count > 1 else ""
        result.notes.append(
            f"{folder!r}: skipped {skipped.count} file{plural} or folder{plural} without pictures ({skipped})"
        )
    return result


def _half(
    folder: str,
    kinds: dict[str, list[str]],
    half: str,
    split: str,
    found: _Listing,
    others: list[str],
    notes: list[str],
) -> str:
    """Returns the folder of a half. Raises DataError where there is none, or more than one."""
    if half not in kinds:
        there = ", ".join(repr(name) for names in kinds.values() for name in names)
        raise DataError(f"{folder!r}: has no {split} half beside {there}")
    if len(kinds[half]) > 1:
        raise DataError(f"{folder!r}: which is its {half} half, {' or '.join(map(repr, kinds[half]))}?")
    if found.pictures:
        raise DataError(f"{folder!r}: has pictures ({found.pictures[0]!r}) beside its halves; move them into one")
    chosen = os.path.join(folder, kinds[half][0])
    if half != split:
        notes.append(f"{chosen!r} is taken for the {split} half, as there is no other")
    if others:
        notes.append(f"{folder!r}: passed over {', '.join(map(repr, others))} beside its halves")
    return chosen


def _take_classes(folder: str, found: _Listing, result: Pictures, skipped: _Skipped) -> None:
    """Adds pictures and, if they are in sub-folders, classes to the result."""
    classes: list[list[str]] = []
    for name in found.folders:
        own = _Skipped()
        classes.append(_walk(os.path.join(folder, name), own))
        if not classes[-1] and not found.pictures:
            why = f"; not a picture: {own}" if own.count else ""
            raise DataError(f"{os.path.join(folder, name)!r}: a class without pictures{why}")
        for example in own.examples:
            skipped.add(example)
        skipped.count += own.count - len(own.examples)
    if found.pictures:
        if any(classes):
            raise DataError(
                f"{folder!r}: has pictures of its own ({found.pictures[0]!r}) beside folders of pictures; "
                "move them into the folder of their class"
            )
        for name in found.folders:
            skipped.add(name)
        result.paths = [os.path.join(folder, name) for name in found.pictures]
        return
    if not classes:
        raise DataError(
            f"{folder!r}: expected one sub-folder of pictures for each class, or pictures, or MNIST's IDX files"
            + (f"; found {skipped}" if skipped.count else "")
        )
    try:
        result.class_names = tuple(same_form(name.encode().decode()) for name in found.folders)
    except UnicodeEncodeError as error:
        raise DataError(f"{folder!r}: the name of a class is not Unicode, {error.object!r}") from error
    result.paths = [path for paths in classes for path in paths]
    result.labels = [label for label, paths in enumerate(classes) for _ in paths]
