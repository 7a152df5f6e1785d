"""Budgets of the CUDA kernels: what nvcc makes of them, and what the tool has to notice."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import cuda_budgets
from cuda_budgets import Instance, Usage

KERNEL = "copy_kernel<float, 3>"
# 64 values that all live at once, in the 32 registers that two blocks of 1024 threads leave.
SPILLS = """
__global__ void __launch_bounds__(1024, 2) spill_kernel(const float4* x, float* y) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const float4 four = x[threadIdx.x + 1024 * i];
    v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i++)
#pragma unroll
    for (int j = 0; j < 64; j++) v[i] = v[i] * v[j] + v[63 - j];
#pragma unroll
  for (int i = 0; i < 64; i++) y[threadIdx.x + 1024 * i] = v[i];
}
"""
SCALAR = """
namespace effnet { namespace {
template <typename T, int K>
__global__ void copy_kernel(const T* x, T* y) { y[threadIdx.x] = x[threadIdx.x + K]; }
}
void run(const float* x, float* y) { copy_kernel<float, 3><<<1, 1>>>(x, y); }
}
"""


def require_nvcc() -> None:
    if cuda_budgets.nvcc_release() is None:
        pytest.skip("nvcc is not on PATH")


def require_nvdisasm() -> None:
    if cuda_budgets.nvdisasm() is None:
        pytest.skip("nvdisasm is neither on PATH nor in a wheel of NVIDIA's or Triton's")


def planted(text: str, folder: Path) -> list[Instance]:
    require_nvcc()
    source = folder / "planted.cu"
    source.write_text(text)
    return cuda_budgets.compile_kernels(source, "90", folder)


def instance(
    registers: int = 40,
    shared: int = 0,
    stack: int = 0,
    *,
    kernel: str = KERNEL,
    arch: str = "90",
) -> Instance:
    return Instance(kernel, arch, Usage(registers, shared, stack), spills=0, vector_loads=1)


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=pytest.mark.slow if arch == "90" else pytest.mark.exhaustive)
        for arch in cuda_budgets.ARCHS
    ],
)
def test_the_kernels_keep_their_budgets(arch: str) -> None:
    require_nvcc()
    instances = cuda_budgets.measure([arch])
    assert instances
    assert cuda_budgets.faults(instances) == []
    release, table = cuda_budgets.read_table()
    if release != cuda_budgets.nvcc_release():
        pytest.skip(
            f"no spills; the table belongs to nvcc {release}, not {cuda_budgets.nvcc_release()}"
        )
    assert cuda_budgets.regressions(instances, table) == []


@pytest.mark.slow
def test_vector_loads_are_counted() -> None:
    require_nvcc()
    require_nvdisasm()
    assert all(at.vector_loads is not None for at in cuda_budgets.measure(["90"]))


def test_the_table_covers_every_architecture() -> None:
    _, table = cuda_budgets.read_table()
    kernels = {kernel for kernel, _ in table}
    assert set(table) == {(kernel, arch) for kernel in kernels for arch in cuda_budgets.ARCHS}
    assert 0 < len(kernels) <= cuda_budgets.MAX_INSTANCES


@pytest.mark.exhaustive
def test_a_planted_spill_is_caught(tmp_path: Path) -> None:
    instances = planted(SPILLS, tmp_path)
    (at,) = instances
    assert at.spills > 0
    assert at.usage.stack > 0
    assert f"spill_kernel spills {at.spills} bytes on sm_90" in cuda_budgets.faults(instances)


@pytest.mark.slow
def test_a_planted_scalar_load_is_caught(tmp_path: Path) -> None:
    require_nvdisasm()
    instances = planted(SCALAR, tmp_path)
    (at,) = instances
    assert (at.kernel, at.spills, at.vector_loads) == (KERNEL, 0, 0)
    assert cuda_budgets.faults(instances) == [f"{KERNEL} loads nothing in 16 bytes on sm_90"]


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"registers": 41}, "registers 41, the table grants 40"),
        ({"shared": 64}, "shared 64, the table grants 32"),
        ({"stack": 8}, "stack 8, the table grants 0"),
    ],
    ids=["registers", "shared", "stack"],
)
def test_a_regression_is_caught(more: dict[str, int], fault: str) -> None:
    table = {(KERNEL, "90"): Usage(40, 32, 0)}
    assert cuda_budgets.regressions([instance(40, 32, 0)], table) == []
    assert cuda_budgets.regressions([instance(39, 0, 0)], table) == []
    assert cuda_budgets.regressions([instance(**{"shared": 32} | more)], table) == [
        f"{KERNEL} on sm_90: {fault}"
    ]


def test_kernels_beside_the_table_are_caught() -> None:
    table = {("gone_kernel", "90"): Usage(1, 0, 0), ("other_arch_kernel", "80"): Usage(1, 0, 0)}
    assert cuda_budgets.regressions([instance()], table) == [
        f"{KERNEL} on sm_90 is not in the table",
        "gone_kernel on sm_90 is in the table alone",
    ]


def test_the_documents_give_the_number_of_instances() -> None:
    """The table's, which holds what is compiled and nothing else."""
    text = (cuda_budgets.ROOT / "docs/decisions/cuda.md").read_text("utf-8")
    given = re.findall(r"there are (\d+) kernel instances", text)
    _, table = cuda_budgets.read_table()
    assert given == [str(len({kernel for kernel, _ in table}))]


def test_too_many_instances_are_caught() -> None:
    many = [instance(kernel=f"k<{i}>", arch=arch) for i in range(110) for arch in ("80", "90")]
    assert cuda_budgets.faults(many) == []
    assert cuda_budgets.faults([*many, instance()]) == [
        "111 kernel instances; at most 110 are allowed"
    ]


def test_the_table_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    path.write_text(cuda_budgets.format_table([instance(), instance(7, 8, 9, arch="80")], "13.0"))
    json.loads(path.read_text())
    assert cuda_budgets.read_table(path) == (
        "13.0",
        {(KERNEL, "90"): Usage(40, 0, 0), (KERNEL, "80"): Usage(7, 8, 9)},
    )


def test_without_nvcc_the_tool_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    monkeypatch.setattr("sys.argv", ["cuda_budgets.py"])
    assert cuda_budgets.main() == 2
    assert capsys.readouterr().out == "nvcc is not on PATH\n"
