"""Builds effnet_fast._C from csrc/ with ninja: C++ for every instruction set, CUDA where nvcc is.

Torch is not needed. Read at build time:
  EFFNET_FAST_CUDA=auto|0|1                  auto: CUDA objects where nvcc is found
  EFFNET_FAST_CUDA_ARCHS=native|all|LIST     LIST as in "80,90"; native: the cards here, else sm_90
  EFFNET_FAST_SIMT=0|auto|1                  1: also effnet_fast._C_simt, the CUDA kernels on the
                                             CPU, for tests; auto: where nvcc and x86-64 are
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
INCLUDE = f"-I{shlex.quote(str(CSRC))}"

CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-g0"]
# GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for a mistake.
CXX_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
X86_ISAS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
# The tile unit (AMX) is asked for at run time, by the few functions that use it.
X86_ISAS["avx512_bf16"] = [*X86_ISAS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
# Every 64-bit Arm CPU has NEON; the define chooses the kernels' own form of it. GCC's first
# scheduling moves loads ahead until the register tiles spill.
ARM_ISAS = {"generic": [], "neon": ["-DEFFNET_NEON", "-fno-schedule-insns"]}
ISAS_OF = {"x86_64": X86_ISAS, "AMD64": X86_ISAS, "aarch64": ARM_ISAS, "arm64": ARM_ISAS}
ISAS = ISAS_OF.get(platform.machine(), {"generic": []})
NVCC_FLAGS = ["-std=c++20", "-O3"]
RELEASE_ARCHS = ["80", "90", "100", "120"]
MIN_ARCH = 80  # of cp.async, with which the kernels copy
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")  # words of CXX before the compiler
# The host run of the CUDA kernels: for this machine alone, so its instructions may be used.
SIMT_FLAGS = ["-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-march=native"]
SIMT_FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SIMT_FLAGS += ["-Wno-deprecated-enum-enum-conversion", "-g0"]


def option(name, default, allowed):
    """Reads a build option from the environment; anything not allowed stops the build."""
    value = os.environ.get(name, default).strip().lower()
    if not re.fullmatch(allowed, value):
        sys.exit(f"{name}={value!r} is not understood: it must match {allowed}")
    return value


def compiler_of(cxx):
    """The compiler among the words of CXX, as in "ccache g++ -m64": what nvcc takes as its own."""
    words = shlex.split(cxx)
    return next((word for word in words if Path(word).name not in LAUNCHERS), "")


def find_cxx():
    """The words of CXX, quoted for a shell, and the compiler among them."""
    cxx = os.environ.get("CXX", "g++")
    words, compiler = shlex.split(cxx), compiler_of(cxx)
    if not compiler or any(shutil.which(word) is None for word in (words[0], compiler)):
        sys.exit(f"effnet-fast: no C++ compiler ({cxx}): install g++ (Debian package: g++)")
    return shlex.join(words), shlex.quote(compiler)


def nvcc_here():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (home and shutil.which("nvcc", path=f"{home}/bin"))


def find_nvcc():
    """Returns nvcc's path, or None where the build is to go without CUDA."""
    wish = option("EFFNET_FAST_CUDA", "auto", "auto|0|1")
    nvcc = None if wish == "0" else nvcc_here()
    if nvcc is None and wish == "1":
        sys.exit("EFFNET_FAST_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME/bin")
    return nvcc


def wants_simt():
    """Whether to build the host run of the CUDA kernels, which is for tests alone."""
    wish = option("EFFNET_FAST_SIMT", "0", "0|auto|1")
    here = platform.machine() in ("x86_64", "AMD64") and platform.system() == "Linux"
    if wish == "1" and not (here and nvcc_here()):
        sys.exit("EFFNET_FAST_SIMT=1 needs x86-64 Linux, and nvcc on PATH or in CUDA_HOME/bin")
    return wish != "0" and here and bool(nvcc_here())


def run_for_text(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def cuda_archs(nvcc):
    """Returns (sm list, compute capability of the PTX), within what this nvcc can generate."""
    wish = option("EFFNET_FAST_CUDA_ARCHS", "native", r"native|all|\d+[af]?([,; ]\d+[af]?)*")
    offered = set(re.findall(r"sm_(\d+[af]?)", run_for_text(nvcc, "--list-gpu-code")))
    offered = {arch for arch in offered if int(arch.rstrip("af")) >= MIN_ARCH}
    if wish == "all":
        archs, ptx = [a for a in RELEASE_ARCHS if a in offered], "80"
    elif wish == "native":
        shown = run_for_text("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        found = {line.strip().replace(".", "") for line in shown.splitlines()}
        archs, ptx = sorted(found & offered, key=int) or ["90"], "80"
    else:
        archs = re.split("[,; ]", wish)
        ptx = None
        old = [a for a in archs if int(a.rstrip("af")) < MIN_ARCH]
        if missing := [a for a in archs if a in old or (offered and a not in offered)]:
            sys.exit(
                f"EFFNET_FAST_CUDA_ARCHS names {missing}; the kernels need {MIN_ARCH} or newer, "
                f"of which {nvcc} offers {sorted(offered, key=lambda a: (len(a), a))}"
            )
    return archs, ptx


class NinjaBuild(build_ext):
    """Writes a build.ninja with one object per source and instruction set, and runs it."""

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An editable install gets a new temporary folder each time; this one keeps the objects.
        work = (
            ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve()
        )
        simt = ext.name.endswith("_simt")
        work = work / "simt" if simt else work
        work.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        nvcc = nvcc_here() if simt else find_nvcc()
        with open(work / "build.ninja", "w") as stream:
            (write_simt_ninja if simt else write_ninja)(stream, out, nvcc)
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        verbose = ["-v"] if self.verbose > 1 else []
        command = [sys.executable, "-m", "ninja", "-C", str(work), *jobs, *verbose]
        if subprocess.run(command).returncode:
            without = "EFFNET_FAST_SIMT=0" if simt else "EFFNET_FAST_CUDA=0"
            hint = f"; {without} builds without CUDA" if nvcc else ""
            sys.exit(f"effnet-fast: compiling csrc/ failed, see the lines above{hint}")


def cpu_sources():
    """The CPU kernels' sources by the names of their objects, as "ops/statistics"."""
    folder = CSRC / "cpu"
    files = sorted(folder.rglob("*.cpp"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def binding_includes():
    import pybind11

    python_include = Path(sysconfig.get_path("include"))
    if not (python_include / "Python.h").is_file():
        sys.exit(f"effnet-fast: no Python.h in {python_include}: install python3-dev")
    folders = (pybind11.get_include(), python_include)
    return [f"-isystem {shlex.quote(str(folder))}" for folder in folders]


def write_simt_ninja(stream, out, nvcc):
    """The CUDA sources as C++; nvcc hands them on to g++ with the folders of its headers."""
    from ninja.ninja_syntax import Writer

    ninja = Writer(stream)
    cxx, compiler = find_cxx()
    ninja.rule("cxx", f"{shlex.quote(nvcc)} -x c++ -ccbin {compiler} -MD -MF $out.d -std=c++20 "
               f"-DEFFNET_SIMT {INCLUDE} -Xcompiler {','.join(SIMT_FLAGS)} $extra -c $in -o $out",
               depfile="$out.d", deps="gcc", description="SIMT $out")  # fmt: skip
    objects = []
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted((CSRC / "simt").glob("*.cpp"))]
    bindings = [CSRC / "bindings/cuda.cpp", CSRC / "simt/module.cpp"]
    for source in [*sources, bindings[0]]:
        objects.append(f"{source.name}.o")
        extra = " ".join(binding_includes()) if source in bindings else ""
        ninja.build(objects[-1], "cxx", str(source), variables={"extra": extra})
    ninja.rule("link", f"{cxx} -shared $in -o $out", description="LINK $out")
    ninja.build(str(out), "link", objects)
    ninja.default(str(out))


def write_ninja(stream, out, nvcc):
    from ninja.ninja_syntax import Writer

    ninja = Writer(stream)
    cxx, compiler = find_cxx()
    flags = " ".join([*CXX_FLAGS, INCLUDE])
    ninja.variable("cxx", cxx)
    ninja.rule("cxx", f"$cxx -MMD -MF $out.d {flags} $extra -c $in -o $out",
               depfile="$out.d", deps="gcc", description="CXX $out")  # fmt: skip
    objects = []

    def compile_cxx(source, name, extra):
        objects.append(f"{name}.o")
        ninja.build(f"{name}.o", "cxx", str(source), variables={"extra": " ".join(extra)})

    for isa, isa_flags in ISAS.items():
        for name, source in cpu_sources().items():
            compile_cxx(source, f"{name}.{isa}", [*isa_flags, f"-DEFFNET_ISA={isa}"])
    defines = [f"-DEFFNET_HAS_{isa.upper()}=1" for isa in ISAS]
    # The include path of pybind11 changes with every isolated build: it goes to the bindings alone.
    defines += binding_includes()
    if nvcc:
        archs, ptx = cuda_archs(nvcc)
        codes = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs]
        codes += [f"-gencode arch=compute_{ptx},code=compute_{ptx}"] if ptx else []
        names = [f"sm_{a}" for a in archs] + ([f"compute_{ptx}"] if ptx else [])
        defines += [f"-DEFFNET_CUDA_ARCHS='\"{' '.join(names)}\"'"]
        nvcc = shlex.quote(nvcc)
        ninja.rule("nvcc", f"{nvcc} -ccbin {compiler} -MD -MF $out.d {' '.join(NVCC_FLAGS)} "
                   f"{INCLUDE} "
                   f"-Xcompiler -fPIC,-fvisibility=hidden {' '.join(codes)} -c $in -o $out",
                   depfile="$out.d", deps="gcc", description="NVCC $out")  # fmt: skip
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            objects.append(f"{source.stem}.cu.o")
            ninja.build(objects[-1], "nvcc", str(source))
        link = f"{nvcc} -shared -cudart static -ccbin {compiler} -Xcompiler -fopenmp"
    else:
        link = f"{cxx} -shared -fopenmp"
    for source in sorted((CSRC / "bindings").glob("*.cpp")):
        if nvcc or source.stem != "cuda":
            compile_cxx(source, f"bindings/{source.stem}", defines)
    ninja.rule("link", f"{link} $in -o $out", description="LINK $out")
    ninja.build(str(out), "link", objects)
    ninja.default(str(out))


if __name__ == "__main__":
    names = ["effnet_fast._C"] + ["effnet_fast._C_simt"] * wants_simt()
    setup(
        ext_modules=[Extension(name, sources=[]) for name in names],
        cmdclass={"build_ext": NinjaBuild},
    )
