"""`effnet-fast info`."""

from __future__ import annotations

import json

import pytest

from effnet_fast.cli import main
from effnet_fast.models import VARIANTS
from effnet_fast.scaling import count
from networks import PARAMETERS


@pytest.mark.parametrize("name", VARIANTS)
def test_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", name, "--json", "--batch", "2", "--dtype", "bf16"]) == 0
    report = json.loads(capsys.readouterr().out)
    counts = count(VARIANTS[name])
    total, stages = report["total"], report["stages"]
    assert total["parameters"] == counts.parameters == PARAMETERS.get(name, counts.parameters)
    assert total["macs"] == counts.macs
    assert total["flops"] == counts.flops
    assert total["activation_bytes"] == 2 * 2 * counts.activations
    assert total["blocks"] == VARIANTS[name].blocks
    for key in ("parameters", "macs", "activation_bytes", "blocks"):
        assert sum(stage[key] for stage in stages) == total[key]
    for mode, plans in total["traffic_bytes"].items():
        for plan, size in plans.items():
            assert sum(stage["traffic_bytes"][mode][plan] for stage in stages) == size
    names = [f"stage {i}" for i in range(1, len(VARIANTS[name].stages) + 1)]
    assert [s["name"] for s in stages] == ["stem", *names, "head"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "b0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "efficientnet_b0  224x224  batch 1  fp32"
    assert lines[-3].split()[:4] == ["total", "16", "5,288,548", "385.8"]
    assert "32x112x112" in lines[2]


def test_traffic_shows_every_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "b0", "--traffic"]) == 0
    out = capsys.readouterr().out
    for plan in ("inference stock", "inference block_fused", "training lean"):
        assert plan in out


def test_options_change_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "b0", "--resolution", "112", "--classes", "10", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = count(VARIANTS["b0"], 112, num_classes=10)
    assert (report["total"]["parameters"], report["total"]["macs"]) == (
        expected.parameters,
        expected.macs,
    )


@pytest.mark.parametrize("arguments", [["b9"], ["b0", "--batch", "0"], ["b0", "--dtype", "int8"]])
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["info", *arguments])
    assert error.value.code == 2


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """Every block that expands, its plan and both plans' bytes and times."""
    assert main(["info", "b0", "--plan", "--batch", "64", "--dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if "->" in line]
    assert len(rows) == 11
    first = next(row for row in rows if row[2] == "16->96")
    assert first[5:7] == ["3x3/2", "fused"]
    # x + 2 e + d and x + d elements of 16 bits: e is 96x112x112, x a sixth, d a quarter of it
    e = 64 * 96 * 112 * 112 * 2 / 1e6
    assert first[7] == f"{e / 6 + 2 * e + e / 4:,.1f}"
    assert first[11] == f"{e / 6 + e / 4:,.1f}"
    assert "Predictions, not measurements" in out
    assert "Not fused: more than 128 input channels." in out


def test_plan_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "b0", "--json", "--batch", "64"]) == 0
    rows = json.loads(capsys.readouterr().out)["plan"]
    assert sum(row["blocks"] for row in rows) == VARIANTS["b0"].blocks - 1
    assert {row["plan"] for row in rows} == {"separate"}  # fp32
    assert {row["reason"] for row in rows} == {"products of fp32 are not made on tensor cores"}
    assert {row["source"] for row in rows} == {"heuristic"}
