"""The package as users meet it: names, types, the kernels' place, imports that stay downward and light."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest

import tarflow_fast

PACKAGE = Path(str(files("tarflow_fast")))
ROOT = Path(__file__).parents[1]


def test_every_public_name_is_there() -> None:
    for name in tarflow_fast.__all__:
        value = getattr(tarflow_fast, name)
        assert name == "__version__" or value.__doc__, name
    assert set(tarflow_fast.__all__) == set(tarflow_fast._HOME) | {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tarflow_fast.nothing  # noqa: B018


def test_no_module_hides_a_public_name() -> None:
    """Importing tarflow_fast.x sets the attribute x of the package: it must not be a function's name."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & set(tarflow_fast.__all__)


def test_kernels_are_part_of_the_package() -> None:
    assert import_module("tarflow_fast.kernels").__doc__


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_import_does_not_wait_for_torch() -> None:
    code = "import sys, tarflow_fast, tarflow_fast.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def imports(path: Path) -> set[str]:
    """Modules that a file imports, relative ones with their dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_the_reference_stands_alone() -> None:
    """It imports torch and the standard library; nothing that it is to judge imports it."""
    ours = {name for name in imports(PACKAGE / "reference.py") if name.startswith((".", "tarflow_fast"))}
    assert not ours
    for path in PACKAGE.rglob("*.py"):
        assert not any(name.endswith("reference") for name in imports(path)), path


def test_imports_run_down_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers are listed in pyproject.toml."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("an installed package is tested")
    linter = pytest.importorskip("importlinter.cli")
    monkeypatch.chdir(ROOT)
    assert linter.lint_imports(no_cache=True) == linter.EXIT_STATUS_SUCCESS


def sources() -> list[str]:
    """The files of this project: those that Git knows, or in an unpacked sdist those that it lists."""
    done = None
    if shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if (ROOT / ".git").exists() and done is not None and done.returncode == 0:
        return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]
    listed = ROOT / "tarflow_fast.egg-info" / "SOURCES.txt"
    if not listed.exists():
        pytest.skip("neither a checkout nor an sdist: an installed package is tested")
    names = listed.read_text(encoding="utf-8").splitlines()
    return [name for name in names if ".egg-info/" not in name and name != "setup.cfg"]


def test_an_sdist_holds_all_that_the_project_is_and_nothing_that_was_built(tmp_path: Path) -> None:
    """So that its tests run, and a wheel or another sdist can be made of it."""
    tree = tmp_path / "tree"
    expected = sources()
    for name in expected:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    for name in ("tarflow_fast/_cpu.cpython.so", "build/objects/kernels.o", "tests/__pycache__/cases.cpython.pyc"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=tree, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = [member.name.partition("/")[2] for member in file if member.isfile()]
    generated = [name for name in held if ".egg-info/" in name or name in ("PKG-INFO", "setup.cfg")]
    assert sorted(set(held) - set(generated)) == sorted(expected)


def test_the_version_is_the_same_everywhere() -> None:
    """In the package, the changelog and the citation."""
    if not (ROOT / "CHANGELOG.md").exists():
        pytest.skip("neither a checkout nor an sdist: an installed package is tested")
    version = tarflow_fast.__version__
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_public_names() -> None:
    assert set(tarflow_fast.__all__) == {*tarflow_fast._HOME, "__version__"}
    assert dir(tarflow_fast) == sorted(tarflow_fast.__all__)
    for name in tarflow_fast.__all__:
        assert getattr(tarflow_fast, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tarflow_fast.nonsense


def test_no_module_hides_a_function() -> None:
    """Importing a module puts it into its package under its own name."""
    for name in tarflow_fast.__all__:
        with pytest.raises(ImportError):
            import_module(f"tarflow_fast.{name}")
