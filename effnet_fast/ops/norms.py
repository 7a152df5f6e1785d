"""The row contract of statistics: one BatchNorm as norm [5,C] in fp32, rows NORM_ROWS.

u = z * scale + shift is the normalised z; mean, rstd and var are those that it was normalised by.
"""

from __future__ import annotations

NORM_ROWS = ("scale", "shift", "mean", "rstd", "var")
SCALE, SHIFT, MEAN, RSTD, VAR = range(5)
