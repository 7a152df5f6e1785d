"""The rule that rounds numbers of channels."""


def round_channels(channels: float, divisor: int = 8) -> int:
    """Nearest multiple of `divisor`, at least `divisor` and never below 0.9 * channels.

    Source: the TensorFlow models' rule, which fixes the widths of the published networks.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded
