"""The wheel, built for real, in an environment of its own: elsewhere and inside a clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compiling

LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
USE_WHEEL = """
import sys, torch, effnet_fast
from effnet_fast import ops, reference
from effnet_fast.backends import native
assert effnet_fast.__file__.startswith(sys.prefix), effnet_fast.__file__
import effnet_fast.triton_kernels
extension = native.load()
assert extension.isas() == sys.argv[1].split(","), extension.isas()
assert not extension.cuda_built() and "EFFNET_FAST_CUDA=0" in extension.cuda_probe()
x = torch.randn(2, 20, 9, 8).contiguous(memory_format=torch.channels_last)
bn = (torch.rand(20) + 0.5, torch.randn(20), torch.randn(20), torch.rand(20) + 0.5)
args = (x, torch.randn(20, 1, 3, 3), *bn)
expected = reference.dwconv_bn_silu(*args)
for isa in extension.isas():
    if extension.isa_unavailable_reason(isa) is None:
        y = ops.dwconv_bn_silu(*args, backend=f"cpu:{isa}")
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
y = effnet_fast.efficientnet_b0().eval()(torch.ones(1, 3, 64, 64))
assert y.shape == (1, 1000) and y.isfinite().all()
assert len(effnet_fast.EfficientNet_B0_Weights.DEFAULT.meta["categories"]) == y.shape[1]
print("works")
"""


def run(*command: object, env: dict[str, str] | None = None, cwd: Path) -> tuple[int, str]:
    """Exit status, and stdout and stderr together."""
    words = [str(part) for part in command]
    done = subprocess.run(
        words, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment's interpreter: it has the wheel made of the sdist, and borrows the rest.

    Build isolation has no torch. Compiled without optimisation: what is tested is the way, and -O3
    takes minutes.
    """
    compiling.require_compiler()
    folder = tmp_path_factory.mktemp("wheel")
    tree = shutil.copytree(compiling.ROOT, folder / "tree", ignore=LEFT_OUT)
    status, text = run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=tree)
    assert status == 0, text
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "source")
    (source,) = (folder / "source").iterdir()
    quick = folder / "quick-c++"
    quick.write_text(f'#!/bin/sh\nexec {" ".join(compiling.CXX)} "$@" -O0\n')
    quick.chmod(0o755)
    pins = {"PIP_CONSTRAINT": str(compiling.ROOT / "constraints.txt")}
    env = os.environ | {"EFFNET_FAST_CUDA": "0", "CXX": str(quick)} | pins
    status, text = run(
        sys.executable, "-m", "build", "--wheel", "-o", folder / "dist", source,
        env=env, cwd=folder,
    )  # fmt: skip
    assert status == 0, text[-4000:]
    assert "torch" not in re.findall(r"Collecting (\w+)", text)
    (wheel,) = (folder / "dist").glob("*.whl")

    status, text = run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    assert status == 0, text
    python = folder / "venv/bin/python"
    install = (python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel)
    status, text = run(*install, cwd=folder)
    assert status == 0, text
    site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    status, text = run(python, "-c", site, cwd=folder)
    borrowed = [entry for entry in sys.path if entry.endswith("site-packages")]
    Path(text.strip(), "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    script = python.with_name("pytest")
    script.write_text(f"#!{python}\nimport sys, pytest\nsys.exit(pytest.main())\n")
    script.chmod(0o755)
    return python


@pytest.mark.exhaustive
def test_wheel_from_the_sdist_in_a_fresh_environment(fresh_python: Path, tmp_path: Path) -> None:
    isas = list(compiling.setup_module().ISAS)
    if "avx512_bf16" in isas:
        isas.append("amx")  # the same objects, with the tile unit
    status, text = run(fresh_python, "-c", USE_WHEEL, ",".join(isas), cwd=tmp_path)
    assert (status, text) == (0, "works\n")


USE_IN_CLONE = """
import sys, torch, effnet_fast
assert effnet_fast.__file__.startswith(sys.prefix), effnet_fast.__file__
fast = effnet_fast.deploy(effnet_fast.efficientnet_b0().eval())
assert fast(torch.ones(1, 3, 64, 64)).isfinite().all()
print("works")
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("program", "arguments", "last"),
    [
        ("python", ("-c", USE_IN_CLONE), "works"),
        ("python", ("-m", "effnet_fast.cli", "info", "b0"), ""),
        ("python", ("-m", "pytest", "-q", "tests/test_import.py"), "passed"),
        ("pytest", ("-q", "tests/ops/test_registration.py", "-k", "dwconv"), "passed"),
        ("pytest", ("benchmarks", "--benchmark-only", "-k", "stem and inference"), "passed"),
    ],
    ids=["script", "cli", "python_m_pytest", "pytest", "benchmarks"],
)
def test_the_installed_package_is_used_in_a_clone(
    fresh_python: Path, tmp_path: Path, program: str, arguments: tuple[str, ...], last: str
) -> None:
    """Whose effnet_fast folder, without kernels, comes first on the path."""
    clone = shutil.copytree(compiling.ROOT, tmp_path / "clone", ignore=LEFT_OUT)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    status, text = run(fresh_python.with_name(program), *arguments, env=env, cwd=clone)
    assert status == 0, text[-4000:]
    assert last in text.splitlines()[-1]
    assert "runs without its kernels" not in text
