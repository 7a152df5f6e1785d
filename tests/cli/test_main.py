"""The entry point: usage errors, the version, and one line per bad input."""

import subprocess
import sys
from importlib import metadata

import pytest

import effnet_fast
from effnet_fast import cli, diagnostics


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"effnet-fast {effnet_fast.__version__}\n"
    assert metadata.version("effnet-fast") == effnet_fast.__version__


@pytest.mark.parametrize("command", ["classify", "bench", "doctor"])
def test_help_lists_json(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["train"],
        ["classify"],
        ["classify", "a.png", "--model", "b9"],
        ["classify", "a.png", "--top", "0"],
        ["bench", "--batch", "-1"],
        ["bench", "--batch", "many"],
        ["bench", "--dtype", "fp64"],
        ["bench", "--rounds", "0"],
        ["doctor", "--threads", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == cli.BAD_INPUT
    assert "usage: effnet-fast" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_as_a_process(tmp_path):
    absent = str(tmp_path / "absent.png")
    command = [sys.executable, "-m", "effnet_fast.cli", "classify", absent]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == cli.BAD_INPUT
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"effnet-fast: {absent}: No such file or directory"
    assert "Traceback" not in done.stderr


def test_interrupt_is_quiet(monkeypatch, capsys):
    def interrupt(model):
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnostics, "doctor", interrupt)
    assert cli.main(["doctor"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == ""
