"""Compound scaling: networks between and beyond the published ones, and what they cost."""

from __future__ import annotations

from effnet_fast.scaling.budget import Fit, fit
from effnet_fast.scaling.compound import CompoundScaling, Point, fit_phi, published
from effnet_fast.scaling.counts import ConvShape, Counts, convolutions, count
from effnet_fast.scaling.passes import PLANS, Traffic, traffic

__all__ = [
    "PLANS",
    "CompoundScaling",
    "ConvShape",
    "Counts",
    "Fit",
    "Point",
    "Traffic",
    "convolutions",
    "count",
    "fit",
    "fit_phi",
    "published",
    "traffic",
]
