"""Triton kernels and their launchers, one file per op; they import torch and triton alone."""
