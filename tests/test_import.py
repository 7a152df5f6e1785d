"""`import effnet_fast` is cheap, and brings in nothing that only some users need."""

import json
import subprocess
import sys

import pytest

import effnet_fast

BUDGET_S = 0.15
RUNS = 3  # the best counts: a busy machine can only add to it
HEAVY = ("PIL", "safetensors", "torchvision", "tqdm", "triton", "effnet_fast.cli")
PUBLIC = (
    *(
        f"efficientnet_{name}"
        for name in ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8", "l2")
    ),
    *(f"EfficientNet_B{i}_Weights" for i in range(8)),
    *("use_backend", "doctor", "ops", "reference", "checkpoints", "__version__"),
    *("weights", "get_weight", "get_model_weights"),
)
SCRIPT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import effnet_fast
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "added": sorted(set(sys.modules) - before)}))
"""


@pytest.fixture(scope="module")
def runs():
    command = [sys.executable, "-c", SCRIPT]
    outputs = [subprocess.run(command, capture_output=True, check=True) for _ in range(RUNS)]
    return [json.loads(output.stdout) for output in outputs]


def test_time_beside_torch(runs):
    assert min(run["seconds"] for run in runs) <= BUDGET_S


def test_imports_nothing_heavy(runs):
    added = runs[0]["added"]
    assert [name for name in added for heavy in HEAVY if f"{name}.".startswith(f"{heavy}.")] == []


def test_a_network_brings_in_nothing_heavy():
    script = SCRIPT.replace("import effnet_fast\n", "import effnet_fast.models\n")
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    added = json.loads(output)["added"]
    assert "effnet_fast.pretrained.weights" in added
    heavy = set(HEAVY) - {"safetensors"}  # reads the weights
    assert not heavy & ({name.split(".")[0] for name in added} | set(added))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    assert getattr(effnet_fast, name) is not None
    assert name in dir(effnet_fast)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="efficientnet_b9"):
        effnet_fast.efficientnet_b9  # noqa: B018
