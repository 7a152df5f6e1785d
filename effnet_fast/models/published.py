"""Networks with published weights: which ones were asked for, and how they get in."""

from __future__ import annotations

import os
from typing import Any

from effnet_fast import checkpoints
from effnet_fast.files import naming_file
from effnet_fast.models.backbone import Backbone
from effnet_fast.models.input_channels import adapt_input_channels
from effnet_fast.models.loading import drop_other_layers
from effnet_fast.pretrained.weights import WeightsEnum, get_model_weights

STEM = "features.0.0.weight"  # [stem channels, in_chans, 3, 3]
CLASSIFIER = "classifier."


def find_published(entry_point: str, weights: Any, num_classes: int) -> WeightsEnum | None:
    """The published weights that an argument of `entry_point` ("efficientnet_b0") asks for.

    Raises:
        ValueError: there are none for this network, or none of that name, or num_classes is
            neither theirs nor 0, which stands for no classifier. "DEFAULT" goes with any number.
        TypeError: weights of another network, or something else.
    """
    if weights is None:
        return None
    try:
        enum = get_model_weights(entry_point)
    except ValueError as error:
        raise ValueError(f"weights must be None, got {weights!r}: {error}") from error
    published = enum.verify(weights)
    assert published is not None
    classes = len(published.meta["categories"])
    if num_classes not in (classes, 0) and weights != "DEFAULT":
        raise ValueError(
            f"The parameter 'num_classes' expected value {classes} but got {num_classes} instead: "
            f"{published!r} has {classes} classes. To train others, replace the classifier of the "
            'loaded network, or give weights="DEFAULT"'
        )
    return published


def load_published(
    model: Backbone,
    published: WeightsEnum,
    in_chans: int,
    progress: bool,
    model_dir: str | os.PathLike[str] | None = None,
) -> None:
    """Loads published weights into `model`: all of them or, when one does not fit, none.

    The stem is adapted to `in_chans` by `adapt_input_channels`. A model without the classifier,
    the head or the last stages does without their weights; a classifier of another number of
    classes stays as it is. model_dir is where the file is kept, as for `get_state_dict`.

    Raises:
        ValueError: names, shapes or dtypes differ from the model's, of which the first few are
            named; or what `WeightsEnum.get_state_dict` raises, as other errors.
    """
    state = published.get_state_dict(model_dir, progress=progress)
    drop_other_layers(model, state)
    if getattr(model, "num_classes", 0) not in (0, len(published.meta["categories"])):
        own = model.state_dict()
        state.update({key: own[key] for key in own if key.startswith(CLASSIFIER)})
    if STEM in state:
        state[STEM] = adapt_input_channels(state[STEM], in_chans)
    with naming_file(repr(published)):
        checkpoints.check(model, state)
    model.load_state_dict(state, strict=True)
