"""What a process can test: it interprets kernels or it compiles them, never both."""

from __future__ import annotations

import os

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
# The folder `interpreted` runs in processes that test_interpreter.py starts.
collect_ignore_glob = ["test_*.py"] if INTERPRETS else ["interpreted/*"]
