"""One module object in several places: it runs in each, as nn.Sequential runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
import networks
from effnet_fast import use_backend
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from effnet_fast.models.variants import B0_STAGES, custom_variant
from networks import TINY, pair, random_images

X = random_images(2, 48)


def append_again(model: Any) -> None:
    model.features[5].append(model.features[5][1])


def set_in_two_places(model: Any) -> None:
    model.features[5][2] = model.features[5][1]


def end_a_stage_with_its_middle(model: Any) -> None:
    """The last block of a stage stands in it once before, and the map is that of the last run."""
    model.features[6][-1] = model.features[6][1]
    model.features[6].append(model.features[6][1])


def classify_twice(model: Any) -> None:
    size = model.num_features
    model.classifier = nn.Sequential(*[nn.Linear(size, size)] * 2)


CHANGES: dict[str, Callable[[Any], None]] = {
    "appended": append_again,
    "two_places": set_in_two_places,
    "end": end_a_stage_with_its_middle,
    "classifier": classify_twice,
}


DEEP = replace(TINY, depth=1.0)  # stages of up to four blocks


def loaded(model: Any) -> Any:
    model.load_state_dict(networks.calibrated_state(DEEP))
    return model.eval()


def assert_runs_as_stock(model: nn.Module) -> None:
    with torch.no_grad():
        with use_backend("reference"):
            expected = _named(model(X))
        networks.assert_alike(_named(model(X)), expected)
        networks.assert_alike(_named(effnet_fast.deploy(model)(X)), expected)


def _named(found: Tensor | list[Tensor]) -> dict[str, Tensor]:
    return {str(i): y for i, y in enumerate(found if isinstance(found, list) else [found])}


@pytest.mark.parametrize("name", CHANGES)
def test_a_classifier(name: str) -> None:
    """Before it has run, and after."""
    model = loaded(EfficientNet(DEEP))
    CHANGES[name](model)
    assert_runs_as_stock(model)
    used = loaded(EfficientNet(DEEP))
    with torch.no_grad():
        before = used(X)
        CHANGES[name](used)
        torch.manual_seed(0)
        after = used(X)
    assert before.shape != after.shape or not torch.equal(before, after)
    assert_runs_as_stock(used)


def test_an_encoder() -> None:
    for name in ("appended", "two_places", "end"):
        model = loaded(EfficientNetFeatures(DEEP))
        CHANGES[name](model)
        assert_runs_as_stock(model)


def test_a_whole_stage() -> None:
    again = replace(B0_STAGES[3], in_channels=B0_STAGES[3].out_channels, stride=1)
    stages = (*B0_STAGES[:4], again, again, *B0_STAGES[4:])
    model = EfficientNet(custom_variant(width=0.25, depth=0.5, stages=stages)).eval()
    model.features[6] = model.features[5]
    model.plan = False  # block by block, to the bit
    with torch.no_grad():
        x, maps = model.forward_intermediates(X, extra_blocks=True)
        assert torch.equal(x, model.forward_features(X))
        assert len(maps) == 10
    model.freeze(6)
    frozen = [all(not p.requires_grad for p in stage.parameters()) for stage in model.features]
    assert frozen == [True] * 7 + [False] * 4
    model.train()
    training = [stage[-1].block[-1][1].training for stage in model.features[1:-1]]
    assert training == [False] * 6 + [True] * 3


def test_a_child_that_is_none() -> None:
    """It is not skipped: PyTorch's own error comes, and deploy says what is wrong."""
    model = pair().actual
    for place in (3, 8):
        kept = model.features[place]
        with torch.no_grad():
            model(X)
            model.features[place] = None
            with pytest.raises(TypeError, match="NoneType"):
                model(X)
            with pytest.raises(RuntimeError, match="a layer that is None"):
                effnet_fast.deploy(model)
            model.features[place] = kept
    block = model.features[5]
    block[1] = None
    with torch.no_grad(), pytest.raises(TypeError, match="NoneType"):
        model(X)
