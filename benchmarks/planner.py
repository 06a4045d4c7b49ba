"""How long planning takes and how much memory: the reference's command line, and 1,024 GPUs.

    python benchmarks/planner.py --output benchmarks/results/cpu/planner.json

Each command runs as a process of its own, start-up included; its peak is the kernel's record of resident memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from moescale.tools.measurement import describe_measurement, write_result

COMMON = "compile --model deepseek-coder-v2-lite --cluster h100-sxm --tokens-per-step 131072 --memory-limit 64 --json"
COMMANDS = {
    "reference, 4 of 8 GPUs": f"{COMMON} --plan-gpus 4 --runtime-gpus 8",
    "reference, 8 of 8 GPUs": f"{COMMON} --plan-gpus 8 --runtime-gpus 8",
    "DeepSeek-V2 on 1,024 GPUs": (
        "compile --model deepseek-v2 --cluster h100-sxm --runtime-gpus 1024 --tokens-per-step 16777216 "
        "--sequence-length 4096 --json"
    ),
    "the same, pp, cp and tp too": (
        "compile --model deepseek-v2 --cluster h100-sxm --runtime-gpus 1024 --tokens-per-step 16777216 "
        "--sequence-length 4096 --allow-unsupported --json"
    ),
}
PROGRAM = (
    "import atexit, json, sys; from moescale.cli import main;"
    "lines = lambda: open('/proc/self/status').read().splitlines();"
    "peak = lambda: next(int(line.split()[1]) * 1024 for line in lines() if line.startswith('VmHWM'));"
    "atexit.register(lambda: print(json.dumps([peak(), 'torch' in sys.modules]), file=sys.stderr));"
    "main(sys.argv[1:])"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name, command in COMMANDS.items():
        seconds, peaks = [], []
        for _ in range(arguments.repeats):
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, *command.split()], capture_output=True, text=True, check=True
            )
            seconds.append(time.perf_counter() - started)
            peak, has_torch = json.loads(done.stderr.splitlines()[-1])
            assert not has_torch
            peaks.append(peak)
        plan = json.loads(done.stdout)
        rows.append(
            {
                "name": name,
                "command": command,
                "seconds": statistics.median(seconds),
                "peak_bytes": max(peaks),
                "num_candidates": plan["num_candidates"],
                "step_seconds": plan["prediction"]["step_seconds"],
                "mesh": plan["mesh"],
            }
        )
        print(f"{name}: {rows[-1]['seconds']:.2f} s, {max(peaks) / 1e6:.0f} MB, {plan['num_candidates']:,} candidates")
    if arguments.output:
        write_result(arguments.output, describe_measurement() | {"rows": rows})


if __name__ == "__main__":
    main()
