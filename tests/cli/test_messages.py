"""Messages of the command line: the library's, with flags in the place of its arguments."""

from __future__ import annotations

import click
import pytest

from tarflow_fast.cli import main
from tarflow_fast.cli.messages import error_text, failure, in_flags
from tarflow_fast.cli.options import Command
from tarflow_fast.errors import ArgumentError, BackendError, CheckpointError, OutOfMemoryError

COMMANDS = {name: command for name, command in main.commands.items() if isinstance(command, Command)}


def fails(command: str, error: Exception) -> tuple[int, str]:
    """The exit code and the line."""
    found = COMMANDS[command]
    failed = failure(click.Context(found), found, error)
    return failed.exit_code, failed.format_message()


@pytest.mark.parametrize(
    ("command", "text", "wanted"),
    [
        ("sample", "use device='cpu', or backend='torch'", "use --device cpu, or --backend torch"),
        ("sample", "compile=True cannot be had", "--compile cannot be had"),
        ("sample", "x.pth: several; choose one by weights", "x.pth: several; choose one by --weights"),
        ("sample", "x.pth: patch_size or in_channels tells", "x.pth: --patch-size or --in-channels tells"),
        ("sample", "x.pth: load it with patch_size=2, head_dim=4", "x.pth: load it with --patch-size 2, --head-dim 4"),
        ("sample", "batch_size: 3 samples need 2 MiB", "--batch-size: 3 samples need 2 MiB"),
        ("info", "no float64; use backend='torch'", "no float64; use --backend torch"),
        ("eval", "'x': give layout, 'NHWC' or 'NCHW'", "'x': give --layout, 'NHWC' or 'NCHW'"),
        ("train", "weights='model' takes those", "convert --weights model takes those"),
        ("eval", "first; values='0..255' says they are not", "first; --values 0..255 says they are not"),
        ("train", "try a lower lr or clip_norm", "try a lower --lr or --clip-norm"),
        ("train", "lower batch_size, or train", "lower --batch-size, or train"),
        ("train", "conditional=False, nvp=True, num_blocks=3.", "--unconditional, --nvp, --blocks 3."),
    ],
)
def test_names_become_flags(command: str, text: str, wanted: str) -> None:
    assert in_flags(COMMANDS[command], text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "runs/batch_size/x.pth: no such file",
        "runs/batch_size=4/x.pth: no such file",
        "lr=0.1.pth: no such file",
        "my_noise_std.npz: empty",
        "x.safetensors: noise_std: expected a finite number >= 0, got 'much'",
        "there is no class 'noise_std'",
        "the labels and the data, as they are: values of threads",
    ],
)
def test_paths_metadata_and_plain_words_stay(text: str) -> None:
    for command in COMMANDS.values():
        assert in_flags(command, text) == text


@pytest.mark.parametrize(
    ("command", "error", "code", "wanted"),
    [
        ("train", ArgumentError("batch_size", "at most 3", 4), 2, "--batch-size: expected at most 3, got 4"),
        ("train", ArgumentError("num_blocks", "3, as x", "8"), 2, "--blocks: expected 3, as x, got 8"),
        (
            "train",
            ArgumentError("conditional", "False, as x", True),
            2,
            "--conditional: expected --unconditional, as x",
        ),
        ("train", ArgumentError("flip", "False, as x", "True"), 2, "--flip: expected none, as x"),
        ("train", ArgumentError("eval_data", "a path", None), 2, "--eval-data: expected a path, got none"),
        (
            "train",
            ArgumentError("data", "the classes ['a', 'b']", "('c',)"),
            1,
            "--data: expected the classes 'a', 'b', got 'c'",
        ),
        ("train", ArgumentError("resume", "a checkpoint", "none"), 1, "--resume: expected a checkpoint, got none"),
        ("sample", ArgumentError("n", "less", 3), 2, "-n: expected less, got 3"),
        ("sample", ArgumentError("path", "a whole URL", "'https:'"), 1, "--model: expected a whole URL, got 'https:'"),
        ("convert", ArgumentError("path", "a whole URL", "'https:'"), 1, "SOURCE: expected a whole URL, got 'https:'"),
        ("eval", ArgumentError("--class-names", "others", "'a'"), 2, "--class-names: expected others, got 'a'"),
        ("sample", BackendError("device 'cuda:9' cannot be used"), 1, "device 'cuda:9' cannot be used"),
        ("sample", OutOfMemoryError("batch_size: too many"), 1, "--batch-size: too many"),
        ("sample", CheckpointError("x: empty"), 1, "x: empty"),
        ("sample", OSError(28, "No space left on device", "x"), 1, "x: No space left on device"),
        ("sample", MemoryError(), 1, "out of memory"),
    ],
)
def test_a_wrong_value_of_an_option_is_wrong_usage(command: str, error: Exception, code: int, wanted: str) -> None:
    assert fails(command, error) == (code, wanted)


def test_notes_are_kept() -> None:
    error = BackendError("no")
    error.add_note("out.partial.png has 3 images")
    assert fails("sample", error) == (1, "no; out.partial.png has 3 images")
    assert error_text(OSError("a\nb")) == "a b"
