"""scale: tables, JSON, figures, and what bad input is answered with."""

import json
import re
import subprocess
import sys

import pytest

from effnet_fast import cli
from effnet_fast.models import VARIANTS
from effnet_fast.scaling import (
    CompoundScaling,
    Conditions,
    count,
    count_memory,
    fit,
    published,
    traffic,
)
from effnet_fast.scaling import latency as latency_module
from effnet_fast.scaling.passes import PLANS as TRAFFIC_PLANS

FIT_KEYS = {"phi", "width", "depth", "resolution", "params", "macs", "flops", "binding"}
SVG, PNG = b"<?xml", b"\x89PNG"


def run(argv, capsys):
    assert cli.main(["scale", *argv]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def run_json(argv, capsys):
    return json.loads(run([*argv, "--json"], capsys))


def refused(argv, capsys):
    """The one line that bad input is answered with."""
    try:
        status = cli.main(["scale", *argv])
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    return captured.err


@pytest.fixture
def quick(monkeypatch):
    """Replaces measuring by a second for each million multiply-adds; stock takes two."""
    calls = []

    def measure(variants, conditions, *, on_burst=None):
        calls.append(conditions)
        plans = latency_module.measured_plans(conditions)
        for _ in range(latency_module.bursts(conditions, len(variants))):
            on_burst("any")
        seconds = [count(v).macs / 1e6 for v in variants]
        return [{p: s * (1 + (p == "stock")) for p in plans} for s in seconds]

    monkeypatch.setattr("effnet_fast.scaling.latency.measure", measure)
    monkeypatch.setattr("effnet_fast.scaling.series.measure", measure)
    return calls


def test_fit_json(capsys):
    report = run_json(["fit", "--macs", "1G", "--memory", "8GiB", "--device", "cpu"], capsys)
    assert report.keys() >= FIT_KEYS
    expected = fit(target_macs=1e9, target_memory=8 * 2**30)
    assert report["phi"] == expected.point.phi
    assert report["macs"] == expected.counts.macs
    assert report["flops"] == 2 * report["macs"]
    assert report["params"] == expected.counts.parameters
    assert report["resolution"] == expected.point.resolution
    assert report["binding"] == ["macs"]
    assert report["shares"] == pytest.approx(expected.shares)
    assert report["memory"]["peak"] == expected.memory.peak


def test_fit_table(capsys):
    text = run(["fit", "--flops", "2G", "--params", "20M"], capsys)
    assert "flops" in text
    assert [line.split()[0] for line in text.splitlines() if line.endswith("binds")] == ["flops"]
    assert "multiply-adds of one image, which the literature on EfficientNet calls FLOPs" in text


def test_flops_and_macs_mean_what_they_say(capsys):
    by_macs = run_json(["fit", "--macs", "0.8G"], capsys)
    by_flops = run_json(["fit", "--flops", "1.6G"], capsys)
    assert by_macs["phi"] == by_flops["phi"]
    assert (by_macs["binding"], by_flops["binding"]) == (["macs"], ["flops"])


def test_fit_tells_how_far_from_the_rule(capsys):
    """300M multiply-adds, of which the rule's own network uses 85%."""
    report = run_json(["fit", "--macs", "300M"], capsys)
    assert report["macs"] >= 0.95 * 300e6
    assert report["on_rule"]["macs"] < 0.86 * 300e6
    assert report["offset"]["distance"] > 0
    assert report["shares"]["macs"] == report["macs"] / 300e6
    text = run(["fit", "--macs", "300M"], capsys)
    assert re.search(r"Off the rule by depth [-+]\S+%, width [-+]\S+%, resolution [-+]", text)
    assert "uses 84.9% of the limit" in text
    on_rule = run_json(["fit", "--macs", "300M", "--on-rule"], capsys)
    assert on_rule["macs"] == report["on_rule"]["macs"]
    assert on_rule["phi"] == report["on_rule"]["phi"]
    assert "is on the rule" in run(["fit", "--macs", "300M", "--on-rule"], capsys)


def test_fit_takes_conditions_and_rule(capsys):
    options = ["--batch", "8", "--dtype", "bf16", "--training", "--plan", "lean"]
    rule = ["--alpha", "1.0", "--beta", "1.0", "--gamma", "1.3", "--multiple", "32"]
    report = run_json(["fit", "--memory", "2GB", *options, *rule], capsys)
    assert report["depth"] == report["width"] == 1.0
    assert report["resolution"] % 32 == 0
    assert report["conditions"]["plan"] == "lean"
    assert report["memory"]["saved"] > 0
    assert report["rule"] == {"alpha": 1.0, "beta": 1.0, "gamma": 1.3}


@pytest.mark.slow
def test_fit_latency(quick, capsys, tmp_path):
    path = tmp_path / "calibration.json"
    argv = ["fit", "--latency", "400s", "--plan", "fused", "--calibration", str(path)]
    report = run_json(argv, capsys)
    assert report["binding"] == ["latency"]
    assert report["latency_s"]["fused"] == pytest.approx(report["macs"] / 1e6, rel=0.3)
    assert report["latency_s"]["stock"] == pytest.approx(2 * report["latency_s"]["fused"])
    assert set(report["latency_model"]["median_error"]) == {"stock", "fused"}
    assert len(quick) == 1
    assert run_json(argv, capsys) == report
    assert len(quick) == 1  # read from the file
    text = run(argv, capsys)
    assert "predicted; networks that the fit had not seen were off by" in text
    assert "Measured on" in text
    assert "measured with batch=1, not 2" in refused([*argv, "--batch", "2"], capsys)


def test_calibration_of_another_machine_is_named(quick, capsys, tmp_path):
    path = tmp_path / "calibration.json"
    argv = ["fit", "--latency", "400s", "--plan", "fused", "--calibration", str(path)]
    run(argv, capsys)
    content = json.loads(path.read_text())
    content["machine"] = "abacus"
    path.write_text(json.dumps(content))
    assert cli.main(["scale", *argv]) == 0
    captured = capsys.readouterr()
    assert "was measured under other conditions: machine abacus, not" in captured.err
    assert "Measured on abacus" in captured.out


@pytest.mark.parametrize("network", [["--model", "b4"], ["--phi", "3.4"], ["--macs", "4G"]])
def test_max_batch(network, capsys):
    argv = ["fit", "--max-batch", "--memory", "8GiB", "--training", "--plan", "stock", *network]
    report = run_json(argv, capsys)
    if network[0] == "--model":
        variant = VARIANTS["b4"]
    elif network[0] == "--phi":
        variant = CompoundScaling().at(report["phi"]).variant
    else:
        variant = fit(target_macs=4e9).point.variant
    batch = report["max_batch"]
    peaks = [count_memory(variant, "training", batch=n).peak for n in (batch, batch + 1)]
    assert peaks[0] == report["memory"]["peak"] <= 8 * 2**30 < peaks[1]
    assert run(argv, capsys).startswith(f"batch {batch} of ")


def test_table(capsys):
    report = run_json(["table", "--batch", "2", "--dtype", "bf16"], capsys)
    assert [network["name"] for network in report["networks"]] == list(published())
    b4 = report["networks"][4]
    assert b4["params"] == 19_341_616
    assert round(b4["macs"] / 1e9, 3) == 4.394
    for mode, plan in TRAFFIC_PLANS:
        rows = traffic(VARIANTS["b4"], mode, plan, batch=2, element_size=2, weight_size=2)
        assert b4["traffic_bytes"][mode][plan] == sum(row.bytes for row in rows)
    plans = {"stock", "fused", "fused_lean", "fast", "lean"}
    assert b4["memory_bytes"]["training"].keys() == plans
    conditions = Conditions(2, latency_module.DTYPES["bf16"], training=True, plan="lean")
    assert b4["memory_bytes"]["training"]["lean"] == vars(conditions.memory(VARIANTS["b4"]))
    rule = CompoundScaling().at(b4["phi"])
    assert b4["rule"]["macs"] == count(rule.variant).macs
    text = run(["table"], capsys)
    for word in ("5,288,548", "66,347,960", "  rule", "  difference", "block_fused", "lean"):
        assert word in text


def test_table_of_any_phi(capsys):
    report = run_json(["table", "--phi", "-1", "0", "2.5"], capsys)
    assert [network["phi"] for network in report["networks"]] == [-1.0, 0.0, 2.5]
    assert all("rule" not in network for network in report["networks"])
    middle = report["networks"][1]
    assert middle["macs"] == middle["unrounded_macs"] == count(VARIANTS["b0"]).macs


def test_grid(capsys, tmp_path):
    path = tmp_path / "trials.csv"
    argv = ["grid", "--step", "0.1", "--tolerance", "0.2", "--csv", str(path)]
    report = run_json(argv, capsys)
    assert report["scorer"] == "estimate"
    assert "estimate" in report["note"]
    scores = [trial["score"] for trial in report["trials"]]
    assert scores == sorted(scores, reverse=True)
    assert all(abs(trial["growth"] - 2) <= 0.2 for trial in report["trials"])
    before = path.read_bytes()
    text = run([*argv, "--top", "2"], capsys)
    assert path.read_bytes() == before
    assert "scored by estimate" in text
    assert "Top-1 is an estimate" in text
    assert "here FLOPs are twice as many" in text
    assert len(text.splitlines()) == 6


@pytest.mark.slow
def test_grid_with_an_own_scorer(capsys, tmp_path, monkeypatch):
    (tmp_path / "my_scorer.py").write_text("def score(network):\n    return 1.0\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    argv = ["grid", "--step", "0.2", "--tolerance", "0.2", "--phi", "-14"]
    report = run_json([*argv, "--scorer", "my_scorer:score"], capsys)
    assert report["scorer"] == "my_scorer:score"
    assert {trial["score"] for trial in report["trials"]} == {1.0}
    assert report["note"] is None
    for name, message in (
        ("my_scorer", "must be MODULE:FUNCTION"),
        ("my_scorer:other", "has no attribute 'other'"),
        ("my_scorer:number", "is not a function"),
        ("no_such_module:score", "No module named 'no_such_module'"),
    ):
        assert message in refused([*argv, "--scorer", name], capsys)


def test_compare(quick, capsys):
    report = run_json(["compare", "--macs", "500M", "1G", "--batch", "2"], capsys)
    networks = report["networks"]
    assert [n["series"] for n in networks] == ["depth", "width", "resolution", "compound"] * 2
    assert all(n["macs"] <= n["target_macs"] for n in networks)
    assert all(n["latency_s"]["stock"] > 0 for n in networks)
    assert quick[0].batch == 2
    assert "estimate" in report["note"]
    text = run(["compare", "--macs", "500M"], capsys)
    assert "top-1, estimate" in text
    assert "stock" in text


def test_compare_without_measuring(quick, capsys):
    report = run_json(["compare", "--macs", "500M", "--no-measure"], capsys)
    assert quick == []
    assert {n["latency_s"] for n in report["networks"]} == {None}


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "magic"), [("svg", SVG), ("png", PNG)])
@pytest.mark.parametrize(
    "argv",
    [
        ["compare", "--macs", "400M"],
        ["compare", "--macs", "400M", "--no-measure"],
        ["grid", "--step", "0.2", "--tolerance", "0.2"],
        ["table"],
        ["table", "--phi", "0", "0.5"],
        ["fit", "--macs", "1G", "--params", "8M", "--latency", "5s"],
    ],
    ids=["compare", "counts", "grid", "table", "phi", "fit"],
)
def test_figures(argv, suffix, magic, quick, capsys, tmp_path):
    path = tmp_path / f"figure.{suffix}"
    run([*argv, "--plot", str(path)], capsys)
    content = path.read_bytes()
    assert content.startswith(magic)
    if suffix == "svg":
        assert {"table": b"parameters", "fit": b"share of the limit"}.get(
            argv[0], b"estimate"
        ) in content


@pytest.mark.slow
def test_small_networks_have_no_estimate(quick, capsys, tmp_path):
    """Below B0 the formula would give what no network has: less than nothing."""
    argv = ["compare", "--macs", "200M", "--plot", str(tmp_path / "figure.svg")]
    for measured in ([], ["--no-measure"]):
        report = run_json([*argv, *measured], capsys)
        assert {n["top1_estimate"] for n in report["networks"]} == {None}
        assert all(line.endswith("  -") for line in run(argv, capsys).splitlines()[1:5])


def test_files_that_cannot_be_written_are_refused_first(quick, capsys, tmp_path, monkeypatch):
    folder, path = tmp_path / "figure.svg", tmp_path / "x.svg"
    folder.mkdir()
    assert "it is a folder" in refused(["compare", "--plot", str(folder)], capsys)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "no permission to write" in refused(["compare", "--plot", str(path)], capsys)
    argv = ["fit", "--latency", "1s", "--calibration", str(path)]
    assert f"--calibration {path}: there is no permission" in refused(argv, capsys)
    assert quick == []


def test_nothing_is_measured_without_a_gpu(quick, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "finds no GPU" in refused(["compare", "--device", "cuda"], capsys)
    run(["compare", "--device", "cuda", "--no-measure", "--macs", "400M"], capsys)


def test_figures_need_matplotlib(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = tmp_path / "figure.svg"
    message = refused(["compare", "--no-measure", "--plot", str(path)], capsys)
    assert 'pip install "effnet-fast[plot]"' in message
    assert not path.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fit"], "give at least one limit: --macs, --flops, --params, --memory, --latency"),
        (["fit", "--macs", "10"], "the smallest needs 45966 parameters, 57936 multiply-adds"),
        (["fit", "--memory", "1kB"], "bytes of memory; given were target_memory=1000 bytes"),
        (["fit", "--macs", "1e30"], "the limits lie beyond phi = 32"),
        (["fit", "--macs", "1GiB"], "'1GiB' has the unknown unit 'GiB'"),
        (["fit", "--memory", "8G"], "'8G' has the unknown unit 'G': give an amount of memory"),
        (["fit", "--latency", "15"], "'15' has no unit: give a time such as 15ms"),
        (["fit", "--macs", "1G", "--alpha", "0.5"], "alpha must be a finite number of at least 1"),
        (["fit", "--macs", "1G", "--plan", "lean"], "plan must be one of stock, fused for infe"),
        (["fit", "--macs", "1G", "--max-batch"], "--max-batch needs --memory"),
        (["fit", "--memory", "1GB", "--max-batch"], "--max-batch needs one network"),
        (
            ["fit", "--memory", "1GB", "--max-batch", "--model", "b0", "--plot", "x.svg"],
            "--plot shows networks near the limits",
        ),
        (["fit", "--memory", "1GB", "--model", "b0"], "--model and --phi belong to --max-batch"),
        (["fit", "--macs", "1G", "--calibration", "x"], "--calibration belongs to --latency"),
        (
            ["fit", "--latency", "1s", "--calibration", "/no/such/folder/x.json"],
            "--calibration /no/such/folder/x.json: there is no folder /no/such/folder",
        ),
        (
            ["fit", "--memory", "1MB", "--max-batch", "--model", "b7"],
            "one image takes [0-9]+ bytes in inference, given were 1000000",
        ),
        (["table", "--phi", "nan"], "phi must be a finite number"),
        (["grid", "--step", "0"], "step and tolerance must be positive"),
        (["grid", "--csv", "/no/such/folder/x.csv"], "/no/such/folder/x.csv: No such file"),
        (["grid", "--engine", "ray"], "needs the package ray: pip install ray"),
        (["compare", "--plot", "figure.txt"], "the file must end in .svg or .png"),
        (["compare", "--plot", "/no/such/folder/x.svg"], "there is no folder /no/such/folder"),
        (["compare", "--macs", "10", "--no-measure"], "series 'depth': no network is that small"),
        (["compare", "--training", "--plan", "lean"], "plan 'lean' cannot be measured"),
    ],
)
def test_bad_input(argv, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    error = refused(argv, capsys)
    assert re.search(message, error.splitlines()[-1])


FIT = """
import sys
from effnet_fast import cli
argv = ["scale", "fit", "--macs", "1G", "--params", "10M", "--memory", "8GiB", "--json"]
assert cli.main(argv) == 0
print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
assert "torch._dynamo" not in sys.modules
"""


@pytest.mark.slow
def test_fit_imports_nothing_heavy():
    """Importing torch is most of what a user waits for."""
    done = subprocess.run([sys.executable, "-c", FIT], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["binding"] == ["macs"]
    assert not {"PIL", "matplotlib", "ray", "torchvision", "triton"} & set(done.stderr.split())


def test_every_option_is_explained(capsys):
    for command in ("fit", "grid", "compare", "table"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["scale", command, "--help"])
        assert ended.value.code == 0
        assert "--json" in capsys.readouterr().out
