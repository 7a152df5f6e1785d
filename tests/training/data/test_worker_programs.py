"""Programs that read with workers: they end, and a script without its guard is told so."""

import subprocess
import sys

import pytest

from image_folders import class_folders

READS = """
import sys
from effnet_fast.training import Loader, TrainingCrop, open_images

def main():
    global loader, batches
    loader = Loader(open_images(sys.argv[1]), workers=1)
    batches = loader.batches([[0], [1]], TrainingCrop(8))
    print(len(next(batches).images), flush=True)
    {last}

{guard}main()
"""


@pytest.fixture
def run(tmp_path):
    folder = class_folders(tmp_path / "images", {"a": 2})

    def run(**parts):
        program = tmp_path / "program.py"
        program.write_text(READS.format(**parts))
        return subprocess.run(
            [sys.executable, program, folder], capture_output=True, text=True, timeout=100
        )

    return run


@pytest.mark.parametrize(
    ("last", "code"),
    [("raise ValueError", 1), pytest.param("pass", 0, marks=pytest.mark.exhaustive)],
)
def test_a_program_that_closes_nothing_ends(run, last, code):
    done = run(last=last, guard="if __name__ == '__main__': ")
    assert (done.returncode, done.stdout) == (code, "1\n")


@pytest.mark.exhaustive
def test_a_script_without_its_guard_is_told_so(run):
    done = run(last="pass", guard="")
    assert done.returncode == 1
    assert "keeps its code under `if __name__ == '__main__':`" in done.stderr
