"""`import effnet_fast` is cheap, and brings in nothing that only some users need."""

import json
import subprocess
import sys

import pytest

import effnet_fast

HEAVY = (
    *("PIL", "huggingface_hub", "safetensors", "timm", "torchvision", "tqdm", "triton"),
    "effnet_fast.cli",
)
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
import json, sys
import torch
before = set(sys.modules)
import {module}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def added_by(module):
    """The modules that an import brings in beside torch's, in a process of its own."""
    command = [sys.executable, "-c", SCRIPT.format(module=module)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.mark.slow
def test_the_package_brings_in_itself_alone():
    assert added_by("effnet_fast") == ["effnet_fast"]


@pytest.mark.slow
def test_a_network_brings_in_nothing_heavy():
    added = added_by("effnet_fast.models")
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
