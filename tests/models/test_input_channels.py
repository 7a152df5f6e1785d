"""Stem weights for other numbers of channels: timm's numbers, and what they are for."""

import pytest
import torch
from timm.models._manipulate import adapt_input_conv

from effnet_fast.models.input_channels import adapt_input_channels

CHANNELS = (1, 2, 3, 4, 5, 6, 7, 13)


def stem(dtype=torch.float32, channels=3):
    return torch.randn(32, channels, 3, 3, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_chans", CHANNELS)
def test_equals_timm(in_chans, dtype):
    weight = stem(dtype)
    before = weight.clone()
    actual = adapt_input_channels(weight, in_chans)
    expected = adapt_input_conv(in_chans, weight)
    assert actual.shape == (32, in_chans, 3, 3)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("in_chans", CHANNELS)
def test_other_numbers_of_trained_channels_equal_timm(in_chans):
    weight = stem(channels=5)
    expected = adapt_input_conv(in_chans, weight, base_chans=5)
    assert torch.equal(adapt_input_channels(weight, in_chans), expected)


def test_float64_keeps_its_digits():
    weight = stem(torch.float64)
    assert torch.equal(adapt_input_channels(weight, 1), weight.sum(1, keepdim=True))


def test_a_grey_image_gives_what_its_three_copies_gave():
    weight, grey = stem(torch.float64), torch.randn(2, 1, 9, 9, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight)
    actual = torch.nn.functional.conv2d(grey, adapt_input_channels(weight, 1))
    torch.testing.assert_close(actual, expected)


def test_the_same_number_is_the_same_tensor():
    weight = stem()
    assert adapt_input_channels(weight, 3) is weight


@pytest.mark.parametrize("in_chans", [0, -1, 1.0, True, "1", None])
def test_refuses_bad_numbers(in_chans):
    with pytest.raises(ValueError, match="in_chans must be an int of at least 1, got"):
        adapt_input_channels(stem(), in_chans)


@pytest.mark.parametrize(
    "weight", [torch.ones(4, 3), torch.ones(4, 3, 3, 3, dtype=torch.int64), torch.ones(4, 0, 3, 3)]
)
def test_refuses_other_tensors(weight):
    with pytest.raises(
        ValueError, match=r"weight must be floating point of shape \[Cout,Cin,K,K\]"
    ):
        adapt_input_channels(weight, 1)
