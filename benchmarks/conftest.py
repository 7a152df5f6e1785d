"""Fixtures of every benchmark."""

import torchvision_cpu  # noqa: F401  (before any import of torchvision)
