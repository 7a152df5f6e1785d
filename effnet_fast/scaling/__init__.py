"""Compound scaling: networks between and beyond the published ones, and what they cost."""

from __future__ import annotations

from effnet_fast.scaling.accuracy import estimate_top1
from effnet_fast.scaling.budget import Fit, fit, max_batch
from effnet_fast.scaling.compound import CompoundScaling, Point, fit_phi, published
from effnet_fast.scaling.conditions import Conditions
from effnet_fast.scaling.counts import ConvShape, Counts, Group, convolutions, count, groups
from effnet_fast.scaling.grid import candidates, grid_search
from effnet_fast.scaling.latency import LatencyModel, calibrate
from effnet_fast.scaling.memory import Memory, count_memory
from effnet_fast.scaling.network_file import random_network, save_network
from effnet_fast.scaling.passes import PLANS, Traffic, traffic
from effnet_fast.scaling.refinement import Offset
from effnet_fast.scaling.series import compare
from effnet_fast.scaling.short_training import ShortTraining
from effnet_fast.scaling.trials import Trial

__all__ = [
    "PLANS",
    "CompoundScaling",
    "Conditions",
    "ConvShape",
    "Counts",
    "Fit",
    "Group",
    "LatencyModel",
    "Memory",
    "Offset",
    "Point",
    "ShortTraining",
    "Traffic",
    "Trial",
    "calibrate",
    "candidates",
    "compare",
    "convolutions",
    "count",
    "count_memory",
    "estimate_top1",
    "fit",
    "fit_phi",
    "grid_search",
    "groups",
    "max_batch",
    "published",
    "random_network",
    "save_network",
    "traffic",
]
