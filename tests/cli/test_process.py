"""The command line as a process: closed pipes, full disks, Ctrl-C, terminals without Unicode."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from effnet_fast import cli, diagnostics
from effnet_fast.cli import common, process
from effnet_fast.scaling import grid

# One command for all that only differ in where the output goes: it runs nothing.
TABLE = [sys.executable, "-c", "import sys; from effnet_fast.cli import main; sys.exit(main())"]


class Failing(io.StringIO):
    """Standard output whose reader has gone, or whose disk is full."""

    def __init__(self, error: OSError, at: str) -> None:
        super().__init__()
        self.error, self.at = error, at

    def write(self, text: str) -> int:
        if self.at == "write":
            raise self.error
        return super().write(text)

    def flush(self) -> None:
        if self.at == "flush":
            raise self.error


@pytest.mark.parametrize("at", ["write", "flush"])
@pytest.mark.parametrize("argv", [["info", "b0"], ["info", "b0", "--json"], ["--help"]], ids=str)
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (BrokenPipeError(32, "Broken pipe"), cli.BROKEN_PIPE, ""),
        (
            OSError(28, "No space left on device"),
            cli.BAD_INPUT,
            "effnet-fast: standard output: No space left on device\n",
        ),
    ],
    ids=["head", "full"],
)
def test_output_that_is_not_taken(monkeypatch, capsys, error, status, message, argv, at) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(error, at))
    assert cli.main(argv) == status
    assert capsys.readouterr().err == message


@pytest.mark.exhaustive
@pytest.mark.parametrize("output", ["/dev/full", "closed", "head"])
def test_output_that_is_not_taken_in_a_process(output: str) -> None:
    command = [*TABLE, "scale", "table", "--json"]
    if output == "/dev/full":
        with open(output, "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
        status, error = done.returncode, done.stderr
    elif output == "closed":
        done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=-1, check=False)
        status, error = done.returncode, done.stderr
    else:
        with subprocess.Popen(command, stdout=-1, stderr=-1) as started:
            assert started.stdout is not None
            assert started.stderr is not None
            started.stdout.close()
            error, status = started.stderr.read(), started.wait()
    expected = {"/dev/full": (cli.BAD_INPUT, 1), "closed": (0, 0), "head": (cli.BROKEN_PIPE, 0)}
    assert (status, len(error.splitlines())) == expected[output], error


def run_light(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A process that imports no torch."""
    setting = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [sys.executable, "-c", f"from effnet_fast.cli import process\n{code}"]
    return subprocess.run(
        command, env=setting, capture_output=True, text=True, check=False, timeout=60, **options
    )


def test_letters_that_the_terminal_lacks_are_written_as_escapes() -> None:
    done = run_light("process.prepare_streams()\nprint('bild\\xe4\\udcff')\nprocess.note('\\xe4')")
    assert done.stdout == "bild\\xe4\\udcff\n"
    assert done.stderr == "effnet-fast: \\xe4\n"


def test_closed_streams_take_every_print() -> None:
    code = (
        "import os, sys\nsys.stdout = sys.stderr = None\nprocess.prepare_streams()\n"
        "print('x'); process.note('y'); sys.stdout.flush(); os._exit(7)"
    )
    assert run_light(code).returncode == 7


def test_ctrl_c_during_imports_is_quiet() -> None:
    code = (
        "import os, signal\n"
        "with process.leaving_at_interrupts():\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n        raise ImportError('as some packages do')\n"
    )
    done = run_light(code)
    assert (done.returncode, done.stderr) == (cli.INTERRUPTED, "")


def test_ctrl_c_after_imports_is_python_s_own_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    with process.leaving_at_interrupts():
        assert signal.getsignal(signal.SIGINT) is process._leave
    assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell sets it for what runs behind
    try:
        with process.leaving_at_interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert not process.leave_at_interrupts()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_importing_the_package_of_commands_imports_none_of_them() -> None:
    done = run_light("import sys; print('torch' in sys.modules, 'argparse' in sys.modules)")
    assert done.stdout == "False False\n"


@pytest.mark.exhaustive
@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.0])
def test_ctrl_c_at_any_time_is_quiet(seconds: float) -> None:
    with subprocess.Popen([*TABLE, "doctor"], stdout=-1, stderr=-1) as started:
        time.sleep(seconds)
        started.send_signal(signal.SIGINT)
        _, error = started.communicate()
    assert error == b""
    # The signal itself ends it once Python, on its way out, has given its handler back.
    assert started.returncode in (0, cli.INTERRUPTED, -signal.SIGINT)


def test_a_worker_of_a_search_leaves_without_a_word(monkeypatch) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with grid._interrupts_held_back():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGINT)  # while the worker imports
            grid._begin_worker(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "--threads", "9" * 30], "9999 is above"),
        (["bench", "--threads", "100000"], "100000 is above"),
        (["scale", "fit", "--macs", "1G", "--threads", "100000"], "100000 is above"),
        (["bench", "--batch", "9" * 30], "is above 2147483647"),
        (["bench", "--batch", "9" * 5000], "is not an integer"),
        (["info", "b0", "--resolution", "0"], "0 is below 1"),
    ],
)
def test_numbers_that_no_machine_takes_are_wrong_usage(capsys, argv, message) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert message in error
    assert len(error) < 2000


@pytest.mark.parametrize(
    "argv",
    [
        ["bench", "--batch", "2000000000"],
        ["bench", "--resolution", "2000000"],
        ["scale", "compare", "--batch", "2000000000"],
        ["scale", "fit", "--latency", "1s", "--batch", "2000000000"],
    ],
    ids=" ".join,
)
def test_a_batch_beyond_the_memory_is_refused_before_anything_runs(capsys, argv) -> None:
    assert cli.main(argv) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert "GB of memory, and this machine has" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("x: can't allocate memory: 1")])
def test_lack_of_memory_is_one_line(monkeypatch, capsys, error: Exception) -> None:
    def fail(model: object) -> None:
        raise error

    monkeypatch.setattr(diagnostics, "doctor", fail)
    assert cli.main(["doctor"]) == cli.BAD_INPUT
    assert capsys.readouterr().err.startswith("effnet-fast: not enough memory")


def test_json_has_null_for_what_is_no_finite_number(capsys) -> None:
    content = {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf, "d": "NaN"}, "e": True}
    common.print_json(content)
    told = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert told == {"a": [None, [None, 1.5]], "b": {"c": None, "d": "NaN"}, "e": True}


@pytest.mark.slow
def test_weights_that_are_no_numbers_give_null(monkeypatch, tmp_path: Path, capsys) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    build = common.build_model

    def spoiled(*arguments: object) -> torch.nn.Module:
        model = build(*arguments)
        torch.nn.init.constant_(model.classifier[1].bias, math.nan)
        return model

    monkeypatch.setattr(common, "build_model", spoiled)
    assert cli.main(["classify", "--model", "b0", str(tmp_path / "a.png"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert report["images"][0]["top"][0]["probability"] is None


@pytest.mark.slow
def test_errors_name_the_file(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("bytes").write_bytes(b"\xff\xfe")
    Path("nested").write_text("[" * 100_000)
    Path("broken_scorer.py").write_text("1 +\n")
    commands = {
        "pipe: a pipe, not a file": [
            ["classify", "pipe"],
            ["classify", "a.png", "--weights", "pipe"],
            ["classify", "a.png", "--labels", "pipe"],
            ["convert", "pipe", "out.pth", "--to", "timm"],
            ["scale", "grid", "--csv", "pipe"],
            ["scale", "fit", "--latency", "1s", "--calibration", "pipe"],
        ],
        "bytes: not UTF-8 text": [
            ["classify", "a.png", "--labels", "bytes"],
            ["scale", "fit", "--latency", "1s", "--calibration", "bytes"],
        ],
        "bytes is not a file of trials": [["scale", "grid", "--csv", "bytes"]],
        "nested is no latency calibration": [
            ["scale", "fit", "--latency", "1s", "--calibration", "nested"]
        ],
        "--scorer broken_scorer:f: SyntaxError": [["scale", "grid", "--scorer", "broken_scorer:f"]],
    }
    for message, lines in commands.items():
        for argv in lines:
            assert cli.main(argv) == cli.BAD_INPUT, argv
            assert f"effnet-fast: {message}" in capsys.readouterr().err, argv
