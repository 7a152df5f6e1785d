"""What can run on this machine, and why the rest cannot: `effnet_fast.doctor()`."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effnet_fast import __version__
from effnet_fast.backends import BACKENDS, OPS, can_run, native
from effnet_fast.diagnostics.model_report import (
    Course,
    Fusion,
    explain_blocks,
    explain_networks,
    layout_advice,
    lines,
)

OPENMP_RUNTIME = re.compile(r"/lib(?:gomp|iomp5|omp)\b[^/]*\.so[^/]*$")
CPU_FLAGS = re.compile(r"sse4_2|f16c|fma|avx\w*|amx_\w+|asimd\w*|sve\w*|bf16")
CUDA_13_DRIVER = 580  # the oldest driver branch that a CUDA 13 runtime works with


@dataclass(frozen=True)
class Report:
    """What `doctor` found. Every "reason" is None where nothing is wrong.

    Args:
        versions: of this package, Python, torch, Triton and the compiler; None where absent.
        extension_reason: why the compiled extension cannot be loaded.
        backends: for each backend, by op, the reason it cannot run.
        isas: for each compiled instruction set, the reason this CPU cannot run it.
        best_isa: the instruction set that "auto" takes.
        deploy: "reason", why `effnet_fast.deploy` cannot be used, and "bf16_products", whether the
            best instruction set has them, without which bf16 networks are computed in fp32.
        cpu: "model", and the vector "flags" that the kernel shows.
        threads: torch's, and how many CPUs this process may use.
        openmp: paths of the OpenMP runtimes loaded into this process.
        cuda: whether kernels were built and for what, the driver, and the reason they cannot run.
        blocks: for a model, each block that could be fused; None without a model.
        networks: for a model, what eval and training run of each network in it; None without.
        layout: for a model whose blocks convert images around themselves, what to do about it.
    """

    versions: dict[str, str | None]
    extension_reason: str | None
    backends: dict[str, dict[str, str | None]]
    isas: dict[str, str | None]
    best_isa: str | None
    deploy: dict[str, Any]
    cpu: dict[str, Any]
    threads: dict[str, int]
    openmp: list[str]
    cuda: dict[str, Any]
    blocks: list[Fusion] | None = field(default=None)
    networks: list[Course] | None = field(default=None)
    layout: str | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists, strings and numbers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {value or 'absent'}" for name, value in self.versions.items())
        text = [f"versions    {versions}"]
        text.append(f"extension   {self.extension_reason or 'loaded'}")
        text += _aligned("backends", [f"{n}: {_verdict(r)}" for n, r in self.backends.items()])
        isas = [
            f"{name}: {reason or 'ok'}{' (best)' if name == self.best_isa else ''}"
            for name, reason in self.isas.items()
        ]
        text += _aligned("isas", isas)
        products = "bfloat16" if self.deploy["bf16_products"] else "bfloat16 computed in float32"
        text.append(f"deploy      {self.deploy['reason'] or f'float32, {products}'}")
        text.append(f"cpu         {self.cpu['model']}: {' '.join(self.cpu['flags'])}")
        threads = self.threads
        text.append(f"threads     {threads['torch']} (torch), {threads['cpus']} CPUs usable")
        text += _aligned("openmp", self.openmp)
        if len(self.openmp) > 1:
            text.append("            more than one runtime: their thread pools compete")
        text += _aligned("cuda", _cuda_lines(self.cuda))
        if self.blocks is not None:
            text += _aligned("model", lines(self.blocks, self.networks or [], self.layout))
        return "\n".join(text)


def doctor(model: nn.Module | None = None) -> Report:
    """Examines this machine, this installation and, if given, a model.

    Args:
        model: for each of its blocks the report says whether it is fused in its present state
            (train or eval, hooks, dtypes, device), and why not; for each network in it, what eval
            without gradients and what training run (the whole network in one call, block by block,
            or stock), whether deploy takes it, and what keeps it from more. Nobody else may run the
            model meanwhile.

    Returns:
        a report to print or, through `to_dict`, to process. A missing extension, driver or Triton
        raises no error: the report has the reason.
    """
    reason = native.unavailable_reason()
    extension = None if reason else native.load()
    blocks = None if model is None else explain_blocks(model)
    return Report(
        versions=versions(),
        extension_reason=reason,
        backends={name: {op: can_run(name, op) for op in OPS} for name in BACKENDS},
        isas={}
        if extension is None
        else {i: extension.isa_unavailable_reason(i) for i in extension.isas()},
        best_isa=None if extension is None else extension.best_isa(),
        deploy={
            "reason": reason,
            "bf16_products": extension is not None and extension.network_has_bf16(""),
        },
        cpu=_cpu(),
        threads={"torch": torch.get_num_threads(), "cpus": _usable_cpus()},
        openmp=_openmp_runtimes(),
        cuda=_cuda(extension),
        blocks=blocks,
        networks=None if model is None else explain_networks(model),
        layout=None if model is None or blocks is None else layout_advice(model, blocks),
    )


def versions() -> dict[str, str | None]:
    """Versions that a measurement or a bug report should name; None for what is absent."""
    extension = None if native.unavailable_reason() else native.load()
    return {
        "effnet-fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "compiler": None if extension is None else extension.compiler(),
    }


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    """A file of /proc, or nothing where the system has none."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _cpu() -> dict[str, Any]:
    info = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    words = flags.group(1).split() if flags else []
    return {
        "model": model.group(1) if model else platform.machine(),
        "flags": sorted(word for word in words if CPU_FLAGS.fullmatch(word)),
    }


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _openmp_runtimes() -> list[str]:
    mapped = {line[line.find("/") :] for line in _read("/proc/self/maps").splitlines()}
    return sorted(path for path in mapped if OPENMP_RUNTIME.search(path))


def _cuda(extension: Any) -> dict[str, Any]:
    version = re.search(
        r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", _read("/proc/driver/nvidia/version")
    )
    built = extension is not None and extension.cuda_built()
    reason: str | None
    if extension is None:
        reason = "the compiled extension is missing"
    elif not built:
        reason = "the extension was built without CUDA: no nvcc was found, or EFFNET_FAST_CUDA=0"
    else:
        reason = extension.cuda_probe() or None
    return {
        "built": built,
        "archs": extension.cuda_archs() if built else None,
        "driver": version.group(1) if version else None,
        "torch_cuda": torch.version.cuda,
        "reason": reason,
    }


def _aligned(title: str, entries: list[str]) -> list[str]:
    return [f"{title if i == 0 else '':<12}{entry}" for i, entry in enumerate(entries or ["none"])]


def _verdict(reasons: dict[str, str | None]) -> str:
    """One line over all ops: ok, the reason they share but for their names, or each op's own."""
    shared = {reason and reason.replace(f" for {op}", "") for op, reason in reasons.items()}
    if len(shared) == 1:
        return shared.pop() or "ok"
    return "; ".join(f"{op}: {reason or 'ok'}" for op, reason in reasons.items())


def _cuda_lines(cuda: dict[str, Any]) -> list[str]:
    kernels = f"kernels built for {cuda['archs']}" if cuda["built"] else "no kernels built"
    lines = [f"{kernels}; {cuda['reason'] or 'a test kernel ran'}"]
    lines.append(
        f"driver {cuda['driver'] or 'absent'}; torch's CUDA {cuda['torch_cuda'] or 'absent'}"
    )
    too_old = cuda["driver"] is None or int(cuda["driver"].split(".")[0]) < CUDA_13_DRIVER
    if too_old and f"driver {CUDA_13_DRIVER}" not in (cuda["reason"] or ""):
        lines.append(
            f"kernels built with CUDA 13 want driver {CUDA_13_DRIVER} or newer, "
            "even where torch's own CUDA works"
        )
    return lines
