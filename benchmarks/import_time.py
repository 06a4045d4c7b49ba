"""How long `import moescale` and `moescale --help` take, beside an empty Python process.

    python benchmarks/import_time.py --output benchmarks/results/cpu/import_time.json

All programs run in turn, round after round, so that a busy machine slows them alike. CPU time is the process's own, by
the kernel's account; of wall time the least round counts, which others disturbed least.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from moescale.tools.measurement import describe_measurement, write_result

PROGRAMS = {
    "python -c pass": ["-c", "pass"],
    "import moescale": ["-c", "import moescale"],
    "moescale --help": ["-m", "moescale", "--help"],
    "moescale compile --help": ["-m", "moescale", "compile", "--help"],
}
EMPTY = "python -c pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for options in PROGRAMS.values():
        run(options)  # fills the page cache, and writes byte code
    for _ in range(arguments.rounds):
        for name, options in PROGRAMS.items():
            times[name].append(run(options))
    rows = [row(name, measured, times[EMPTY]) for name, measured in times.items()]
    for line in rows:
        print(
            f"{line['program']:24} {line['cpu_seconds']:.3f} s of CPU, {line['cpu_ratio']:.1f} times; "
            f"{line['wall_seconds']:.3f} s, {line['wall_ratio']:.1f} times {EMPTY}"
        )
    if arguments.output:
        write_result(arguments.output, describe_measurement("cyclopts", "rich") | {"rows": rows})


def run(options: list[str]) -> tuple[float, float]:
    """Run Python with ``options``; its CPU time and wall time in seconds."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *options], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"python {' '.join(options)} ended with status {process.returncode}")
    return usage.ru_utime + usage.ru_stime, wall


def row(name: str, measured: list[tuple[float, float]], empty: list[tuple[float, float]]) -> dict[str, Any]:
    """Median CPU time and least wall time of a program, and both as ratios to the empty one's."""
    cpu, cpu_empty = (statistics.median(cpu for cpu, _ in of) for of in (measured, empty))
    wall, wall_empty = (min(wall for _, wall in of) for of in (measured, empty))
    return {
        "program": name,
        "cpu_seconds": cpu,
        "cpu_ratio": cpu / cpu_empty,
        "wall_seconds": wall,
        "wall_ratio": wall / wall_empty,
    }


if __name__ == "__main__":
    main()
