"""Building and installing: what the source distribution holds, what setup.py says.

They run setup.py with compilers that only pretend; test_wheel.py builds for real.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import compiling

pytestmark = pytest.mark.slow  # a process each
LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "dist", "tests", "benchmarks", "*.egg-info", "__pycache__", "*.so"
)
FAKE_CXX = """#!/bin/sh
# Makes the file after -o, and the dependency file that ninja expects beside it; a folder of headers
# that is not there is an error.
while [ $# -gt 0 ]; do
    case "$1" in
        -I*) [ -d "${1#-I}" ] || exit 3 ;;
        -o) echo > "$2" ;;
        -MF) echo "x:" > "$2" ;;
    esac
    shift
done
"""
FAKE_NVCC = """#!/bin/sh
case "$*" in
    *--list-gpu-code*) printf 'sm_75\\nsm_80\\nsm_86\\nsm_90\\nsm_100\\nsm_120\\n' ;;
    *.cu*) if [ -e "$(dirname "$0")/nvcc_is_broken" ]; then echo no >&2; exit 1; fi ;;
esac
""" + FAKE_CXX.removeprefix("#!/bin/sh\n")
# setup.py on another machine, which is the first argument.
ELSEWHERE = """
import platform, runpy, sys
machine = sys.argv.pop(1)
platform.machine = lambda: machine
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""
SETS = {
    "x86_64": ["generic", "avx2", "avx512", "avx512_bf16"],
    "aarch64": ["generic", "neon"],
    "riscv64": ["generic"],
}
FAKE_SMI = "#!/bin/sh\nprintf '%s\\n'\n"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree without what was built in it."""
    return shutil.copytree(
        compiling.ROOT, tmp_path_factory.mktemp("source") / "effnet-fast", ignore=LEFT_OUT
    )


def run(*command: object, env: dict[str, str] | None = None, cwd: Path) -> tuple[int, str]:
    """Exit status, and stdout and stderr together."""
    done = subprocess.run(
        [str(part) for part in command],
        env=env,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    status, text = run(sys.executable, "setup.py", "-q", "sdist", "-d", out, cwd=tree)
    assert status == 0, text
    (archive,) = out.glob("*.tar.gz")
    return archive


def test_sdist_holds_all_sources(sdist: Path, tree: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for folder in ("csrc", "triton_kernels", "effnet_fast"):
        expected = {str(p.relative_to(tree)) for p in (tree / folder).rglob("*") if p.is_file()}
        assert expected
        assert expected <= files
    expected = {"setup.py", "pyproject.toml", "README.md", "constraints.txt"}
    assert expected | {"LICENSE", "LICENSE.torchvision"} <= files
    assert not [name for name in files if name.endswith((".so", ".pyc", ".o"))]


class FakeTools:
    """Compilers that only pretend, alone on PATH beside the shell's own tools."""

    def __init__(self, folder: Path, tree: Path) -> None:
        self.folder, self.tree = folder, tree
        (folder / "bin").mkdir()
        for name in ("sh", "dirname"):
            if found := shutil.which(name):
                (folder / "bin" / name).symlink_to(found)
        self.add("g++", FAKE_CXX)

    def add(self, name: str, text: str = "") -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def build(self, *, machine: str = "", **env: str) -> tuple[int, str]:
        """Runs setup.py's build of the extension into a fresh folder, on this kind of machine."""
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        script = ["-c", ELSEWHERE, machine] if machine else ["setup.py"]
        command = [sys.executable, *script, "-q", "build_ext", "-b", work / "lib"]
        env = {"PATH": str(self.folder / "bin"), **env}
        return run(*command, "-t", work / "temp", env=env, cwd=self.tree)

    def ninja(self) -> str:
        return (self.folder / "work/temp/build.ninja").read_text()

    def simt_ninja(self) -> Path:
        """That of the host run of the CUDA kernels."""
        return self.folder / "work/temp/simt/build.ninja"


@pytest.fixture
def tools(tmp_path: Path, tree: Path) -> FakeTools:
    return FakeTools(tmp_path, tree)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"EFFNET_FAST_CUDA": "maybe"},
            "EFFNET_FAST_CUDA='maybe' is not understood: it must match auto|0|1",
        ),
        (
            {"EFFNET_FAST_CUDA_ARCHS": "fast"},
            "EFFNET_FAST_CUDA_ARCHS='fast' is not understood: it must match native|all|",
        ),
        (
            {"EFFNET_FAST_CUDA_ARCHS": "90,75"},
            "EFFNET_FAST_CUDA_ARCHS names ['75']; the kernels need 80 or newer, of which ",
        ),
        ({"EFFNET_FAST_CUDA_ARCHS": "90,87"}, "EFFNET_FAST_CUDA_ARCHS names ['87']; "),
        (
            {"EFFNET_FAST_SIMT": "yes"},
            "EFFNET_FAST_SIMT='yes' is not understood: it must match 0|auto|1",
        ),
        (
            {"CXX": "nonexistent-c++"},
            "effnet-fast: no C++ compiler (nonexistent-c++): install g++ (Debian package: g++)",
        ),
        ({"CXX": "ccache"}, "effnet-fast: no C++ compiler (ccache): "),
    ],
    ids=["cuda", "archs_word", "archs_old", "archs_unknown", "simt", "no_compiler", "no_word"],
)
def test_what_stops_a_build_is_one_line(
    tools: FakeTools, env: dict[str, str], message: str
) -> None:
    tools.add("nvcc", FAKE_NVCC)
    status, text = tools.build(**env)
    assert status != 0
    assert text.startswith(message)
    assert len(text.splitlines()) == 1


def test_cuda_wanted_without_nvcc(tools: FakeTools) -> None:
    status, text = tools.build(EFFNET_FAST_CUDA="1")
    assert status != 0
    assert text == "EFFNET_FAST_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME/bin\n"


def test_the_host_run_is_built_only_where_asked_for(tools: FakeTools) -> None:
    tools.add("nvcc", FAKE_NVCC)
    assert tools.build()[0] == 0
    assert not tools.simt_ninja().exists()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the host run is for x86-64")
@pytest.mark.parametrize("cuda", ["auto", "0"])
def test_the_host_run_compiles_every_kernel(tools: FakeTools, cuda: str) -> None:
    """With CUDA's part and without."""
    tools.add("nvcc", FAKE_NVCC)
    status, text = tools.build(EFFNET_FAST_SIMT="auto", EFFNET_FAST_CUDA=cuda)
    assert status == 0, text
    ninja = tools.simt_ninja().read_text()
    for source in (compiling.ROOT / "csrc/cuda").glob("*.cu"):
        assert f"build {source.name}.o: cxx" in ninja
    assert "-DEFFNET_SIMT" in ninja
    assert list((tools.folder / "work/lib/effnet_fast").glob("_C_simt*.so"))


def test_the_host_run_without_nvcc(tools: FakeTools) -> None:
    status, text = tools.build(EFFNET_FAST_SIMT="auto")
    assert status == 0, text
    assert not tools.simt_ninja().exists()
    status, text = tools.build(EFFNET_FAST_SIMT="1")
    assert status != 0
    assert text == ("EFFNET_FAST_SIMT=1 needs x86-64 Linux, and nvcc on PATH or in CUDA_HOME/bin\n")


@pytest.mark.parametrize("setting", ["auto", "0"])
def test_without_cuda(tools: FakeTools, setting: str) -> None:
    """No nvcc, or none wanted."""
    if setting == "0":
        tools.add("nvcc", FAKE_NVCC)
    status, text = tools.build(EFFNET_FAST_CUDA=setting)
    assert status == 0, text
    assert "nvcc" not in tools.ninja()
    assert "-DEFFNET_CUDA_ARCHS" not in tools.ninja()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("archs", "smi", "expected"),
    [
        ("", (), "sm_90 compute_80"),
        ("native", ("8.6",), "sm_86 compute_80"),
        ("native", ("9.0", "7.5", "9.0"), "sm_90 compute_80"),
        ("native", ("7.5",), "sm_90 compute_80"),
        ("all", ("8.6",), "sm_80 sm_90 sm_100 sm_120 compute_80"),
        ("80;100", ("8.6",), "sm_80 sm_100"),
    ],
    ids=["default", "native", "native_beside_old", "native_old_alone", "all", "list"],
)
def test_cuda_archs(tools: FakeTools, archs: str, smi: tuple[str, ...], expected: str) -> None:
    """Cards from before cp.async are passed over: their owners get the CPU part and a reason."""
    tools.add("nvcc", FAKE_NVCC)
    if smi:
        tools.add("nvidia-smi", FAKE_SMI % "\\n".join(smi))
    env = {"EFFNET_FAST_CUDA_ARCHS": archs} if archs else {}
    status, text = tools.build(**env)
    assert status == 0, text
    ninja = tools.ninja().replace("$\n", "").replace("    ", " ")
    assert f"-DEFFNET_CUDA_ARCHS='\"{expected}\"'" in ninja
    codes = re.findall(r"code=(\w+)", next(x for x in ninja.splitlines() if "-gencode" in x))
    assert codes == expected.split()


@pytest.mark.parametrize(
    ("cxx", "compiler"),
    [("clang++", "clang++"), ("ccache g++", "g++"), ("ccache my-c++ -m64", "my-c++")],
)
def test_nvcc_is_given_the_compiler(tools: FakeTools, cxx: str, compiler: str) -> None:
    """That of CXX, for objects and for the link; not the launcher before it."""
    tools.add("nvcc", FAKE_NVCC)
    for name in {*cxx.split(), compiler} - {"g++", "-m64"}:
        tools.add(name, '#!/bin/sh\nexec "$@"\n' if name == "ccache" else FAKE_CXX)
    status, text = tools.build(CXX=cxx)
    assert status == 0, text
    commands = [line for line in tools.ninja().replace("$\n", "").splitlines() if "nvcc" in line]
    commands = [line for line in commands if "command =" in line]
    assert len(commands) == 2
    for command in commands:
        assert re.findall(r"-ccbin\s+(\S+)", command) == [compiler]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the host run is for x86-64")
def test_a_path_with_a_space(tree: Path, tmp_path: Path) -> None:
    spaced = shutil.copytree(tree, tmp_path / "my sources")
    tools = FakeTools(tmp_path, spaced)
    tools.add("nvcc", FAKE_NVCC)
    status, text = tools.build(EFFNET_FAST_SIMT="1")
    assert status == 0, text


def test_nvcc_in_cuda_home(tools: FakeTools, tmp_path: Path) -> None:
    (tmp_path / "cuda/bin").mkdir(parents=True)
    tools.add("nvcc", FAKE_NVCC)
    (tmp_path / "bin/nvcc").rename(tmp_path / "cuda/bin/nvcc")
    status, text = tools.build(CUDA_HOME=str(tmp_path / "cuda"))
    assert status == 0, text
    assert str(tmp_path / "cuda/bin/nvcc") in tools.ninja()


def test_a_failing_nvcc_names_the_way_out(tools: FakeTools) -> None:
    tools.add("nvcc", FAKE_NVCC)
    tools.add("nvcc_is_broken")
    status, text = tools.build()
    assert status != 0
    last = text.splitlines()[-1]
    assert last.startswith("effnet-fast: compiling csrc/ failed")
    assert last.endswith("EFFNET_FAST_CUDA=0 builds without CUDA")


@pytest.mark.parametrize(("machine", "isas"), SETS.items())
def test_every_source_is_compiled_for_every_instruction_set(
    tools: FakeTools, machine: str, isas: list[str]
) -> None:
    status, text = tools.build(machine=machine)
    assert status == 0, text
    ninja = tools.ninja().replace("$\n", "").replace("    ", " ")
    for name in compiling.setup_module().cpu_sources():
        assert re.findall(rf"build {name}\.(\w+)\.o: cxx", ninja) == isas
    assert set(re.findall(r"-DEFFNET_ISA=(\w+)", ninja)) == set(isas)
    assert set(re.findall(r"-DEFFNET_HAS_(\w+)=1", ninja)) == {isa.upper() for isa in isas}
    assert ("-mavx2" in ninja) == ("avx2" in isas)
    assert ("-DEFFNET_NEON" in ninja) == ("neon" in isas)


def test_a_second_build_compiles_nothing(tools: FakeTools) -> None:
    assert tools.build()[0] == 0
    command = [sys.executable, "-m", "ninja", "-C", tools.folder / "work/temp", "-n"]
    status, text = run(*command, env=os.environ | {"PATH": str(tools.folder)}, cwd=tools.folder)
    assert status == 0
    assert "no work to do" in text
