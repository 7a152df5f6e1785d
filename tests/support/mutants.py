"""`make mutants`: shows that the tests of `make test` notice each fault of a checked-in list.

A mutant is killed where a test fails, where the tests crash, or where they do not end. A mutant
counts only where the same tests pass without it. Results are kept in build/mutants/results.jsonl:
an interrupted run goes on where it stopped. The exit status is 1 where a mutant survives, does not
compile or cannot be judged.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mutant_copy import Copy, machine
from mutant_list import FOLDER, Mutant, read_mutants

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build/mutants"
TESTS_FAILED = 1  # pytest's exit status
NO_RESULT = (2, 3, 4, 5)  # interrupted, internal error, wrong usage, no test: not of a fault alone
BASELINE_LIMIT_S = 600.0

Row = dict[str, Any]


class Results:
    """Rows in a file of JSON lines, by key; later rows replace earlier ones."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows: dict[str, Row] = {row["key"]: row for row in map(json.loads, lines)}

    def add(self, row: Row) -> None:
        """Keeps a row, and writes it."""
        with self._lock:
            self.rows[row["key"]] = row
            with open(self.path, "a") as stream:
                stream.write(json.dumps(row) + "\n")


def _digest(*parts: str | bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()[:16]


def limit_of(seconds: float) -> float:
    """How long tests may take that take so many seconds without a fault."""
    return 60.0 + 4 * seconds


def mutant_key(mutant: Mutant) -> str:
    """By the row, the file that it changes and the files of its tests."""
    files = [ROOT / mutant.file]
    for path in map(ROOT.joinpath, mutant.paths):
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return f"{mutant.name}-{_digest(repr(mutant), *(file.read_bytes() for file in files))}"


class Runner:
    """Tries mutants in copies of the checkout, each in one at a time."""

    def __init__(self, copies: Sequence[Copy], results: Results, fresh: bool) -> None:
        self.results, self.fresh = results, fresh
        self.digest = copies[0].digest()
        self.free: queue.Queue[Copy] = queue.Queue()
        for copy in copies:
            self.free.put(copy)
        self._lock = threading.Lock()
        self._baselines: dict[str, threading.Lock] = {}

    def baseline(self, copy: Copy, mutant: Mutant) -> Row:
        """How the mutant's tests end without it."""
        key = f"baseline-{self.digest}-{_digest(repr((mutant.tests, mutant.environment)))}"
        with self._lock:
            lock = self._baselines.setdefault(key, threading.Lock())
        with lock:
            if key not in self.results.rows:
                outcome = copy.test(mutant, BASELINE_LIMIT_S)
                self.results.add(
                    {"key": key, "passes": outcome.status == 0, "by": outcome.failed}
                    | {"seconds": round(outcome.seconds, 1)}
                )
            return self.results.rows[key]

    def judge(self, copy: Copy, mutant: Mutant) -> Row:
        """The mutant's row of results."""
        before = self.baseline(copy, mutant)
        if not before["passes"]:
            return {"state": "unusable", "by": f"without it: {before['by']}", "seconds": 0.0}
        with copy.with_fault(mutant) as message:
            if message:
                return {"state": "does not compile", "by": message, "seconds": 0.0}
            outcome = copy.test(mutant, limit_of(before["seconds"]))
        state = "killed"
        if outcome.status == 0:
            state = "SURVIVES"
        elif outcome.status in NO_RESULT and not outcome.failed.startswith("ERROR"):
            state = "unusable"
        by = outcome.failed
        if outcome.status is not None and outcome.status < 0:
            by = f"crash, signal {-outcome.status}"
        return {"state": state, "by": by, "seconds": round(outcome.seconds, 1)}

    def run(self, mutant: Mutant) -> Row:
        """The mutant's row: the one that is there, or a new one."""
        key = mutant_key(mutant)
        if not self.fresh and key in self.results.rows:
            return self.results.rows[key]
        copy = self.free.get()
        try:
            row = {"key": key, "name": mutant.name, "area": mutant.area, "kind": mutant.kind}
            row |= self.judge(copy, mutant)
        finally:
            self.free.put(copy)
        if row["state"] != "unusable":
            self.results.add(row)
        print(f"{row['state']:>9} {row['seconds']:6.1f} s  {mutant.name}: {row['by']}", flush=True)
        return row


def table(rows: Sequence[Row]) -> str:
    """The results in Markdown."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    killed = sum(row["state"] == "killed" for row in rows)
    where = f"{machine()}, {datetime.date.today()}, commit {commit}"
    lines = [
        "# Mutants",
        "",
        f"The tests of `make test` notice {killed} of {len(rows)} small faults ({where}).",
        "",
        "| area | fault | kind | state | noticed by | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        by = row["by"].splitlines()[0].replace("|", "\\|")
        cells = (row["area"], row["name"], row["kind"], row["state"], f"`{by}`", row["seconds"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--area", action="append", help="this area alone; may be repeated")
    parser.add_argument("--only", action="append", metavar="NAME", help="this mutant alone")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are tested side by side")
    parser.add_argument("--fresh", action="store_true", help="try again what has a result")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--table", action="store_true", help="write tests/mutants/RESULTS.md")
    options = parser.parse_args(arguments)
    mutants = [m for m in read_mutants() if not options.area or m.area in options.area]
    mutants = [m for m in mutants if not options.only or m.name in options.only]
    if options.list or not mutants:
        print("\n".join(f"{m.area:24} {m.name}" for m in mutants) or "no such mutant")
        return 0 if mutants else 2
    WORK.mkdir(parents=True, exist_ok=True)
    results = Results(WORK / "results.jsonl")
    pending = [m for m in mutants if options.fresh or mutant_key(m) not in results.rows]
    jobs = max(1, min(options.jobs, len(pending)))
    build_jobs = max(1, (os.cpu_count() or 1) // jobs)
    copies = [Copy(ROOT, WORK / f"copy-{i}", build_jobs) for i in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        if pending:
            list(pool.map(Copy.prepare, copies))
        rows = list(pool.map(Runner(copies, results, options.fresh).run, mutants))
    for copy in copies:
        copy.close()
    if options.table:
        (FOLDER / "RESULTS.md").write_text(table(rows))
    alive = [row for row in rows if row["state"] != "killed"]
    print(f"{len(rows) - len(alive)} of {len(rows)} mutants are killed")
    for row in alive:
        print(f"  {row['area']}/{row['name']}: {row['state']}: {row['by']}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
