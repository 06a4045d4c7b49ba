"""The 16B model on eight GPUs, as the reference runs it and as the planner would, predicted and measured.

    python benchmarks/eight_gpus.py --data CORPUS --output eight.json --stages reference plans
    python benchmarks/eight_gpus.py --data CORPUS --output eight-more.json --stages throughput scaling resume

Each of the two ends within ten minutes: what no longer fits ``--seconds`` is not started, and the file says so. Every
plan, and so every prediction, is made before its run; runs are killed after their last measured step.

- ``reference``: the reference's flags (a plan for half of the GPUs, two copies) through train.py of examples/ under
  torchrun, and by ``moescale run`` alone.
- ``plans``: the planner's own best for all GPUs beside five other plans; ``regret`` is what the best of those that were
  measured would have saved.
- ``throughput``: 65,536 and 1,048,576 tokens a step, with the router's choice and an even one (``balanced_run.py``).
- ``scaling``: nine layers on 1, a quarter, a half and all of the GPUs, 65,536 tokens each.
- ``resume``: four layers; a checkpoint of all GPUs goes on with a half and a quarter of them, and one rank is killed.

``--device cpu --model FOLDER --gpus 4`` tries the program on CPU ranks with a small model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from planned_runs import describe_run, find_plan, model_folder
from processes import kill, log_of, moescale, rank_process, read_steps, start, torchrun

from moescale.tools.measurement import describe_measurement, write_result

HERE = Path(__file__).parent
TRAIN = HERE.parent / "examples" / "deepseek_coder_v2_lite" / "train.py"
STAGES = ("reference", "plans", "throughput", "scaling", "resume")
OTHER_PLANS = (("1", "fsdp"), ("2", "fsdp"), ("4", "zero1"), ("8", "zero1"), ("8", "fsdp"))
"""Of expert parallelism and what shards the dense weights."""
STEPS = 5
LEAST_SECONDS = 70
"""What a run of the whole model takes: planning, random weights, compiling, five steps."""
CHOSEN = "the planner's"
Launch = Callable[[Path, Path], list[str]]
"""Of a plan's file and the folder to write to, the command."""


class Bench:
    """The options of the command line, where to write, and until when."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.count = options, folder, 0
        self.deadline = time.monotonic() + options.seconds
        self.on_cpu = options.device == "cpu"

    def place(self) -> Path:
        self.count += 1
        place = self.folder / str(self.count)
        place.mkdir()
        return place

    def tokens(self, count: int) -> int:
        """Tokens of a step: ``count``, on CPU ranks two sequences a rank."""
        return 2 * self.options.sequence_length * self.options.gpus if self.on_cpu else count

    def layers(self, count: int) -> str:
        """The model with its first ``count`` layers; a folder is used whole."""
        model = self.options.model
        return model if Path(model).is_dir() else model_folder(f"{model}/{count}", self.place() / "model")

    def plan(self, path: Path, model: str, gpus: int | str, tokens: int, *options: object) -> dict[str, Any]:
        given: list[object] = ["--cluster", self.options.cluster, "--plan-gpus", gpus, "--tokens-per-step", tokens]
        given += ["--sequence-length", self.options.sequence_length]
        if self.on_cpu:
            given += ["--precision", "fp32"]
        return find_plan(path, model, *given, *options)

    def run_options(self, plan: Path, model: str, output: Path) -> list[str]:
        options = ["run", "--plan", plan, "--model", model, "--data", self.options.data, "--output", output]
        return [*map(str, options), *(("--device", "cpu", "--no-compile") if self.on_cpu else ())]

    def run(
        self, case: str, model: str, gpus: int | str, tokens: int, *options: object, launch: Launch | None = None
    ) -> dict[str, Any]:
        """Plan, then run by the plan until it has made ``STEPS`` steps; what was predicted and measured.

        ``launch``: another command than ``moescale run`` alone.
        """
        place = self.place()
        plan_file, output = place / "plan.json", place / "run"
        plan = self.plan(plan_file, model, gpus, tokens, *options)
        if "error" in plan:
            return {"case": case} | plan
        alone = moescale(*self.run_options(plan_file, model, output), "--no-final-checkpoint")
        command = alone if launch is None else launch(plan_file, output)
        steps = self.steps_of(start(command, output), output, STEPS)
        failure = None if len(steps) >= STEPS else log_of(output).read_text()[-4000:] or "no time left"
        row = describe_run(plan, steps[:STEPS])
        per_gpu = row["tokens_per_second"] and row["tokens_per_second"] / plan["runtime_gpus"]
        measured = {"tokens_per_second_per_gpu": per_gpu, "command": shorten(command), "error": failure}
        return {"case": case} | row | measured

    def steps_of(self, process: subprocess.Popen[bytes], output: Path, count: int) -> list[dict[str, Any]]:
        """Wait for the records of ``count`` steps, or the end of the process or of the time, and kill it."""
        try:
            self.wait_for_steps(process, output, count)
        finally:
            kill(process)
        return read_steps(output)

    def wait_for_steps(self, process: subprocess.Popen[bytes], output: Path, count: int) -> None:
        while process.poll() is None and len(read_steps(output)) < count and time.monotonic() < self.deadline:
            time.sleep(0.1)


def shorten(command: list[str]) -> str:
    """The command without the machine's own paths."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in command)


def reference(bench: Bench) -> Iterator[dict[str, Any]]:
    """Half of the GPUs hold one copy; once by the reference's command line, once without a launcher."""
    options, gpus = bench.options, bench.options.gpus

    def by_train_py(plan: Path, output: Path) -> list[str]:
        flags = ["--model_id", options.model, "--dataset_path", options.data, "--plan_path", plan]
        flags += ["--output_path", output, f"--plan_ngpus={gpus // 2}", f"--runtime_ngpus={gpus}", "--steps", 1000]
        return torchrun(gpus, TRAIN, *flags)

    shape = (gpus // 2, bench.tokens(131072), "--runtime-gpus", gpus)
    if not bench.on_cpu:  # train.py takes GPUs
        yield bench.run("train.py", options.model, *shape, launch=by_train_py)
    yield bench.run("moescale run", options.model, *shape)


def plans(bench: Bench) -> Iterator[dict[str, Any]]:
    """The planner's best, and plans that it did not choose."""
    options, gpus = bench.options, bench.options.gpus
    tokens, seconds = bench.tokens(131072), {}
    cases: list[tuple[str, int | str, tuple[object, ...]]] = [(CHOSEN, "auto", ("--runtime-gpus", gpus))]
    for ep, sharding in OTHER_PLANS:
        cases.append((f"ep {ep}, {sharding}", gpus, ("--pin", f"ep={ep}", "--pin", f"dense_sharding={sharding}")))
    for case, plan_gpus, pins in cases:
        row = bench.run(case, options.model, plan_gpus, tokens, *pins)
        seconds[case] = row.get("measured_seconds")
        yield row
    measured = [value for value in seconds.values() if value is not None]
    if seconds[CHOSEN] is not None:
        yield {"case": "regret", "regret": seconds[CHOSEN] / min(measured) - 1, "plans": len(measured)}


def throughput(bench: Bench) -> Iterator[dict[str, Any]]:
    """Small steps and large ones, with the router's choice and with an even one."""
    options, gpus = bench.options, bench.options.gpus

    def balanced(plan: Path, output: Path) -> list[str]:
        run = bench.run_options(plan, options.model, output)
        return torchrun(gpus, HERE / "balanced_run.py", *run, "--no-final-checkpoint")

    for tokens in dict.fromkeys(map(bench.tokens, (65536, 1048576))):
        for routing, launch in (("natural", None), ("forced even", balanced)):
            case = f"{tokens} tokens a step, routing {routing}"
            yield bench.run(case, options.model, gpus, tokens, launch=launch)


def scaling(bench: Bench) -> Iterator[dict[str, Any]]:
    """Nine layers, as many tokens a GPU on any number of GPUs."""
    gpus, model, alone = bench.options.gpus, bench.layers(9), None
    tokens = bench.tokens(65536 * gpus) // gpus
    for ranks in sorted({1, max(1, gpus // 4), max(1, gpus // 2), gpus}):
        row = bench.run(f"{ranks} GPUs", model, ranks, tokens * ranks)
        per_gpu = row.get("tokens_per_second_per_gpu")
        alone = per_gpu if ranks == 1 else alone
        yield row | {"efficiency": per_gpu and alone and per_gpu / alone}


def resume(bench: Bench) -> Iterator[dict[str, Any]]:
    """Losses after a checkpoint of all GPUs went on with fewer, beside those of a run that was not stopped."""
    gpus, model, place = bench.options.gpus, bench.layers(4), bench.place()
    tokens = bench.tokens(8192 * gpus)
    fewer = [count for count in (gpus // 2, gpus // 4) if count]
    files = {ranks: place / f"plan-{ranks}.json" for ranks in (gpus, *fewer)}
    for ranks, path in files.items():
        plan = bench.plan(path, model, ranks, tokens)
        if "error" in plan:
            yield {"case": f"a plan for {ranks}"} | plan
            return

    def finish(case: str, ranks: int, output: Path, steps: int) -> dict[str, Any]:
        # A constant learning rate: another schedule would depend on how many steps are asked for.
        options = [*bench.run_options(files[ranks], model, output), "--steps", steps, "--schedule", "constant"]
        left = max(1.0, bench.deadline - time.monotonic())
        done = subprocess.run(moescale(*options), capture_output=True, text=True, timeout=left)
        losses = [round(record["loss"], 5) for record in read_steps(output)]
        error = done.stderr[-4000:] if done.returncode else None
        return {"case": case, "status": done.returncode, "losses": losses, "error": error}

    yield finish(f"6 steps on {gpus}", gpus, place / "whole", 6)
    stopped = finish(f"4 steps on {gpus}", gpus, place / "stopped", 4)
    yield stopped
    for ranks in fewer if stopped["status"] == 0 else ():
        output = place / f"resumed-{ranks}"
        shutil.copytree(place / "stopped", output, copy_function=os.link)
        (output / "metrics.jsonl").unlink()  # a run adds to it
        shutil.copy2(place / "stopped" / "metrics.jsonl", output)
        yield finish(f"4 steps on {gpus}, 2 more on {ranks}", ranks, output, 6)
    yield killed_rank(bench, bench.run_options(files[gpus], model, place / "killed"), place / "killed")


def killed_rank(bench: Bench, run: list[str], output: Path) -> dict[str, Any]:
    """Kill the last rank after the second step: how long the others take to end, and what the run says."""
    process = start(moescale(*run, "--steps", 1000, "--no-final-checkpoint"), output)
    try:
        bench.wait_for_steps(process, output, 2)
        victim = rank_process(process.pid, bench.options.gpus - 1)
        row: dict[str, Any] = {"case": "the last rank is killed", "seconds_to_end": None}
        if victim is not None and process.poll() is None:
            os.kill(victim, signal.SIGKILL)
            begin = time.monotonic()
            process.wait(timeout=max(1.0, bench.deadline - begin))
            row["seconds_to_end"] = round(time.monotonic() - begin, 1)
        return row | {"status": process.poll(), "says": log_of(output).read_text()[-1500:]}
    finally:
        kill(process)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--model", default="deepseek-coder-v2-lite")
    parser.add_argument("--cluster", default="h100-sxm")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=570, help="to start no run later than this allows")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a run in progress is killed, as at an interrupt
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row)[:1500], flush=True)
        write_result(options.output, describe_measurement() | {"gpus": options.gpus, "rows": rows})

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        stages = {
            "reference": reference,
            "plans": plans,
            "throughput": throughput,
            "scaling": scaling,
            "resume": resume,
        }
        for name in options.stages:
            cases = stages[name](bench)
            while True:
                if not bench.on_cpu and bench.deadline - time.monotonic() < LEAST_SECONDS:
                    note({"stage": name, "case": "the rest of this stage", "error": "not started: no time left"})
                    break
                try:
                    note({"stage": name} | next(cases))
                except StopIteration:
                    break


if __name__ == "__main__":
    main()
