"""The host run of the CUDA kernels: planted faults are caught, the kernels pass under sanitizers.

Whether the kernels compute what they should is for the parity tests, with backend "simt".
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import compiling
import simt

pytestmark = pytest.mark.slow  # compiles for some seconds

WRONG_VALUES = "wrong values"
ASAN = "AddressSanitizer: heap-buffer-overflow"
# What is said of each planted fault; those of the second table without a sanitizer are not found.
CAUGHT = {
    "missing_barrier": WRONG_VALUES,
    "missing_second_barrier": WRONG_VALUES,
    "missing_copy_wait": WRONG_VALUES,
    "copy_wait_too_short": WRONG_VALUES,
    "missing_barrier_after_copy": WRONG_VALUES,
    "copy_never_waited_for": "returns without having waited for its copy of cp_async",
    "copy_to_outside": "copies with cp_async to outside of shared memory",
    "unset_shared": WRONG_VALUES,
    "misaligned": "moves 8 bytes at an address that is no multiple of that, at ",
    "divergent_barrier": "waits in another at ",
    "return_before_barrier": " waits in sync_threads at ",
    "deadlock": "stops last in a deadlock: 31 wait in a shuffle at ",
    "different_masks": "or has another mask",
    "mask_without_itself": "with a mask that it is not in itself",
    "source_outside_the_mask": WRONG_VALUES,
    "too_much_shared": "needs more shared memory than a block may have: 52000 bytes static",
}
CAUGHT_BY_SANITIZERS = {
    "global_out_of_bounds": ASAN,
    "copy_from_outside": ASAN,
    "shared_out_of_bounds": ASAN,
    "dynamic_out_of_bounds": ASAN,
    "local_out_of_bounds": "out of bounds for type 'float [4]'",
    "integer_overflow": "runtime error: signed integer overflow",
}
SEEDS = range(1, 6)
DRIVER = compiling.ROOT / "tests/csrc/simt_driver.cpp"


def run(program: Path, *words: object) -> tuple[int, str]:
    """Exit status, and all that was printed."""
    command = [str(program), *(str(word) for word in words)]
    # The stacks of fibers that an error leaves behind are no leaks.
    env = {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3600, env=env
    )
    return done.returncode, done.stdout


@pytest.fixture(
    scope="session", params=["plain", pytest.param("sanitized", marks=pytest.mark.exhaustive)]
)
def faults(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of planted faults."""
    return faults_program(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def sanitized_faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults_program("sanitized", tmp_path_factory)


def faults_program(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    simt.require()
    sources = [compiling.ROOT / "tests/csrc/simt_faults.cu", *simt.RUNTIME]
    flags = simt.SANITIZED if kind == "sanitized" else ("-O1",)
    return simt.once(
        tmp_path_factory,
        f"simt_faults_{kind}",
        lambda folder: simt.compile_program(folder, sources, *flags),
    )


def test_every_planted_fault_is_expected(faults: Path) -> None:
    status, text = run(faults, "list")
    assert status == 0
    assert sorted(text.split()) == sorted([*CAUGHT, *CAUGHT_BY_SANITIZERS])


@pytest.mark.parametrize("name", [*CAUGHT, *CAUGHT_BY_SANITIZERS])
def test_without_the_fault_a_kernel_passes(faults: Path, name: str) -> None:
    for seed in SEEDS:
        assert run(faults, name, "right", seed) == (0, "right\n")


@pytest.mark.parametrize("name", CAUGHT)
def test_planted_faults_are_caught(faults: Path, name: str) -> None:
    for seed in SEEDS:
        status, text = run(faults, name, "wrong", seed)
        assert status in (1, 2)
        assert CAUGHT[name] in text


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CAUGHT_BY_SANITIZERS)
def test_planted_faults_are_caught_by_sanitizers(sanitized_faults: Path, name: str) -> None:
    status, text = run(sanitized_faults, name, "wrong", 1)
    assert status != 0
    assert CAUGHT_BY_SANITIZERS[name] in text


@pytest.mark.exhaustive
def test_the_kernels_under_sanitizers(tmp_path: Path) -> None:
    simt.require()
    sources = [DRIVER, *simt.KERNELS, *simt.RUNTIME]
    status, text = run(simt.compile_program(tmp_path, sources, *simt.SANITIZED))
    assert status == 0, text
    assert text.startswith("0 of ")


# Those that the depthwise kernels make, by file and place: each is taken out alone.
BARRIER, WAIT = "sync_threads();", "cp_async_wait<0>();"
SAID = {
    BARRIER: "is not finite|depends on the threads' order",
    WAIT: "returns without having waited for its copy",
}
CALLS = [
    pytest.param(path.name, call, at, id=f"{path.stem}-{call.split('(')[0]}-{at}")
    for path in simt.KERNELS
    if path.stem.startswith("dwconv")
    for call in SAID
    for at in range(path.read_text().count(call))
]
# What sends fp32 and fp16 elsewhere: without it kernels are compiled, and run, for bf16 alone.
OTHER_DTYPES = re.compile(r"\n *if \(\w+\.\w*dtype == DType::kFloat(32|16)\) return [^;]*;")
ONE_DTYPE = "bf16"


def test_every_call_of_the_depthwise_kernels_is_taken_out() -> None:
    assert {call.values[:2] for call in CALLS} == {
        (f"dwconv_bn_silu{part}.cu", call) for part in ("", "_backward") for call in SAID
    }


@pytest.fixture(scope="session")
def bf16_objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the driver's objects, of which a test replaces one."""
    simt.require()

    def make(folder: Path) -> Path:
        sources = folder / "sources"
        sources.mkdir(parents=True)
        for path in simt.KERNELS:
            (sources / path.name).write_text(OTHER_DTYPES.sub("", path.read_text()))
        kernels = [sources / path.name for path in simt.KERNELS]
        objects = simt.compile_objects(folder, [DRIVER, *kernels, *simt.RUNTIME], "-O1")
        status, text = run(compiling.link(folder / "program", objects, "-O1"), ONE_DTYPE)
        assert status == 0, text
        return folder

    return simt.once(tmp_path_factory, "simt_bf16", make)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("file", "call", "at"), CALLS)
def test_the_driver_notices_a_kernel_without(
    file: str, call: str, at: int, bf16_objects: Path, tmp_path: Path
) -> None:
    """One barrier or wait taken out."""
    parts = (bf16_objects / "sources" / file).read_text().split(call)
    broken = tmp_path / file
    broken.write_text(call.join(parts[: at + 1]) + call.join(parts[at + 1 :]))
    objects = [path for path in bf16_objects.glob("*.o") if path.name != f"{file}.o"]
    objects += simt.compile_objects(tmp_path, [broken], "-O1")
    status, text = run(compiling.link(tmp_path / "program", objects, "-O1"), ONE_DTYPE)
    assert status == 1, text
    assert re.search(SAID[call], text)
