"""A source tree beside an installed copy: the whole package comes from one of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import compiling
import effnet_fast

pytestmark = pytest.mark.slow  # each test starts processes that import torch
PACKAGE = compiling.ROOT / "effnet_fast"
EXTENSION = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
WITHOUT_BUILDS = shutil.ignore_patterns("*.so", "__pycache__")
WHERE = """
import importlib, json, sys
import effnet_fast
from effnet_fast.backends import use_backend
package = sys.modules["effnet_fast"]
assert package is effnet_fast and package.backends.__file__.startswith(package.__path__[0])
print(json.dumps([package.__file__, package.__spec__.origin, package.__version__]))
"""
RUN = """
import sys, warnings, torch, effnet_fast
x = torch.ones(1, 3, 32, 32)
with warnings.catch_warnings(record=True) as caught, torch.no_grad():
    warnings.simplefilter("always")
    for name in sys.argv[1:]:
        model = effnet_fast.efficientnet_b0(backend=name).eval()
        model(x)
        if name == "auto":
            torch.compile(model.features[0], backend="eager", fullgraph=True)(x)
print(*(str(w.message) for w in caught if "effnet_fast" in str(w.message)), sep="\\n")
"""


def borrowed() -> list[str]:
    """Folders of the packages that this process uses; their .pth files are not read there."""
    return [entry for entry in sys.path if entry.endswith("site-packages")]


def run(script: str, *args: str, tree: Path, path: list[Path]) -> str:
    """What a script prints that is started in a tree, with no editable installation about."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), *borrowed()])}
    command = [sys.executable, "-S", "-c", script, *args]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which nothing was built."""
    tree = tmp_path_factory.mktemp("clone")
    shutil.copytree(PACKAGE, tree / "effnet_fast", ignore=WITHOUT_BUILDS)
    shutil.copytree(compiling.ROOT / "triton_kernels", tree / "triton_kernels")
    for name in ("csrc", "setup.py"):
        (tree / name).symlink_to(compiling.ROOT / name)
    return tree


def install(tree: Path, folder: Path, *names: str) -> Path:
    """A copy of the tree's package as version 9, with empty files of these names."""
    package = folder / "effnet_fast"
    shutil.copytree(tree / "effnet_fast", package, ignore=shutil.ignore_patterns("__pycache__"))
    init = package / "__init__.py"
    init.write_text(init.read_text().replace(effnet_fast.__version__, "9"))
    for name in names:
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).touch()
    return folder


def test_an_installed_copy_is_taken_whole(tree: Path, tmp_path: Path) -> None:
    """Past another source tree with a build of its own."""
    other = install(tree, tmp_path / "other", EXTENSION)
    site = install(tree, tmp_path / "site", EXTENSION, "triton_kernels/__init__.py")
    found = json.loads(run(WHERE, tree=tree, path=[other, site]))
    init = str(site / "effnet_fast/__init__.py")
    assert found == [init, init, "9"]


@pytest.mark.parametrize("names", [(), (EXTENSION,), ("triton_kernels/__init__.py",)])
def test_what_is_no_installation_with_kernels_is_not(
    tree: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    site = install(tree, tmp_path / "site", *names)
    found = json.loads(run(WHERE, tree=tree, path=[site]))
    assert found[0] == str(tree / "effnet_fast/__init__.py")


def test_a_tree_with_kernels_stays(tree: Path, tmp_path: Path) -> None:
    own = install(tree, tmp_path / "own", EXTENSION)
    site = install(tree, tmp_path / "site", EXTENSION, "triton_kernels/__init__.py")
    found = json.loads(run(WHERE.replace("from effnet_fast.backends", "#"), tree=own, path=[site]))
    assert found[0] == str(own / "effnet_fast/__init__.py")


def test_missing_kernels_are_told_once(tree: Path) -> None:
    """With the remedy; by "auto" alone."""
    text = run(RUN, "auto", "auto", tree=tree, path=[])
    assert text.count("effnet_fast runs without its kernels, slowly") == 1
    assert f"source tree {tree}" in text
    assert "pip install ." in text
    assert run(RUN, "reference", tree=tree, path=[]).strip() == ""


def test_kernels_of_another_tree_are_not_used(tree: Path) -> None:
    """An editable installation offers whatever submodule this one lacks."""
    kernels = compiling.ROOT / "triton_kernels"
    finder = f"""
import sys
from importlib.machinery import PathFinder
from importlib.util import spec_from_file_location
class Editable:
    def find_spec(name, path=None, target=None):
        if name in ("effnet_fast._C", "effnet_fast._C_simt"):
            return PathFinder.find_spec(name, [{str(PACKAGE)!r}])
        if name == "effnet_fast.triton_kernels":
            return spec_from_file_location(name, {str(kernels / "__init__.py")!r})
sys.meta_path.append(Editable)
from effnet_fast.backends import can_run
print(can_run("cpu", "mbconv"), can_run("triton", "mbconv"), sep="\\n")
"""
    cpu, triton = run(finder, tree=tree, path=[]).splitlines()
    assert "which holds no compiled effnet_fast._C" in cpu
    assert "another copy of effnet_fast" in triton or "cannot be imported" in triton
