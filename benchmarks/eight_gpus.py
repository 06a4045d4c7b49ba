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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planned_runs import compile_plan, describe_run, model_folder, read_steps

from moescale.tools.measurement import describe_measurement, write_result

HERE = Path(__file__).parent
TRAIN = HERE.parent / "examples" / "deepseek_coder_v2_lite" / "train.py"
STAGES = ("reference", "plans", "throughput", "scaling", "resume")
OTHER_PLANS = (("1", "fsdp"), ("2", "fsdp"), ("4", "zero1"), ("8", "zero1"), ("8", "fsdp"))
"""Of expert parallelism and what shards the dense weights."""
STEPS = 5
LEAST_SECONDS = 70
"""What a run of the whole model takes: planning, random weights, compiling, five steps."""


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

    def plan(self, path: Path, model: str, gpus: int, tokens: int, *options: object) -> dict[str, Any]:
        given: list[object] = ["--cluster", self.options.cluster, "--plan-gpus", gpus, "--tokens-per-step", tokens]
        given += ["--sequence-length", self.options.sequence_length]
        if self.on_cpu:
            given += ["--precision", "fp32"]
        return compile_plan(path, model, *given, *options)

    def run_options(self, plan: Path, model: str, output: Path) -> list[str]:
        options = ["run", "--plan", plan, "--model", model, "--data", self.options.data, "--output", output]
        return [*map(str, options), *(("--device", "cpu", "--no-compile") if self.on_cpu else ())]

    def measured(self, plan: dict[str, Any], command: list[str], output: Path, steps: int = STEPS) -> dict[str, Any]:
        """Run ``command`` until ``output`` has the records of ``steps`` steps, and describe it."""
        log = output.parent / f"{output.name}.log"
        process = start(command, log)
        try:
            while process.poll() is None and len(read_steps(output)) < steps and time.monotonic() < self.deadline:
                time.sleep(0.1)
        finally:
            kill(process)
        found = read_steps(output)
        failure = None if len(found) >= steps else log.read_text()[-4000:] or "no time left"
        return describe_run(plan, found[:steps]) | {"command": shorten(command), "error": failure}


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def descendants(pid: int) -> list[int]:
    """The processes that ``pid`` and its children have started, and that live."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in path.read_text().split()]
        except OSError:  # ended meanwhile
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def rank_process(pid: int, rank: int) -> int | None:
    """The process of ``rank`` below ``pid``."""
    for child in descendants(pid):
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment:
            return child
    return None


def shorten(command: list[str]) -> str:
    """The command without the machine's own paths."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in command)


def moescale(options: list[str]) -> list[str]:
    return [sys.executable, "-m", "moescale", *options]


def torchrun(ranks: int, script: Path, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), str(script), *options]


def reference(bench: Bench) -> Iterator[dict[str, Any]]:
    """Half of the GPUs hold one copy; once by the reference's command line, once without a launcher."""
    options, gpus = bench.options, bench.options.gpus
    for way in ("train.py", "moescale run") if not bench.on_cpu else ("moescale run",):  # train.py takes GPUs
        place = bench.place()
        plan_file, output = place / "plan.json", place / "run"
        plan = bench.plan(plan_file, options.model, gpus // 2, bench.tokens(131072), "--runtime-gpus", gpus)
        if "error" in plan:
            yield {"case": way} | plan
            continue
        if way == "moescale run":
            command = moescale([*bench.run_options(plan_file, options.model, output), "--no-final-checkpoint"])
        else:
            flags = ["--model_id", options.model, "--dataset_path", options.data, f"--plan_ngpus={gpus // 2}"]
            flags += [f"--runtime_ngpus={gpus}", "--plan_path", plan_file, "--output_path", output, "--steps", 1000]
            command = torchrun(gpus, TRAIN, [str(flag) for flag in flags])
        yield {"case": way} | bench.measured(plan, command, output)


def plans(bench: Bench) -> Iterator[dict[str, Any]]:
    """The planner's best, and plans that it did not choose."""
    options, gpus = bench.options, bench.options.gpus
    best: dict[str, float] = {}
    for ep, sharding in (("auto", "auto"), *OTHER_PLANS):
        pins = () if ep == "auto" else ("--pin", f"ep={ep}", "--pin", f"dense_sharding={sharding}")
        name = "the planner's" if ep == "auto" else f"ep {ep}, {sharding}"
        place = bench.place()
        how_many = "auto" if ep == "auto" else gpus
        more = ("--runtime-gpus", gpus) if ep == "auto" else ()
        plan = bench.plan(place / "plan.json", options.model, how_many, bench.tokens(131072), *more, *pins)
        if "error" in plan:
            yield {"case": name} | plan
            continue
        command = moescale(
            [*bench.run_options(place / "plan.json", options.model, place / "run"), "--no-final-checkpoint"]
        )
        row = bench.measured(plan, command, place / "run")
        if row["measured_seconds"] is not None:
            best[name] = row["measured_seconds"]
        yield {"case": name} | row
    if "the planner's" in best:
        yield {"case": "regret", "regret": best["the planner's"] / min(best.values()) - 1, "plans": len(best)}


def throughput(bench: Bench) -> Iterator[dict[str, Any]]:
    """Small steps and large ones, with the router's choice and with an even one."""
    options, gpus = bench.options, bench.options.gpus
    for tokens in dict.fromkeys(map(bench.tokens, (65536, 1048576))):
        for routing in ("natural", "forced even"):
            place = bench.place()
            plan = bench.plan(place / "plan.json", options.model, gpus, tokens)
            name = {"case": f"{tokens} tokens a step, routing {routing}"}
            if "error" in plan:
                yield name | plan
                continue
            run = [*bench.run_options(place / "plan.json", options.model, place / "run"), "--no-final-checkpoint"]
            command = moescale(run) if routing == "natural" else torchrun(gpus, HERE / "balanced_run.py", run)
            row = bench.measured(plan, command, place / "run")
            per_gpu = row["tokens_per_second"] and row["tokens_per_second"] / gpus
            yield name | row | {"tokens_per_second_per_gpu": per_gpu}


def scaling(bench: Bench) -> Iterator[dict[str, Any]]:
    """Nine layers, as many tokens a GPU on any number of GPUs."""
    gpus, model, alone = bench.options.gpus, bench.layers(9), None
    tokens = bench.tokens(65536 * gpus) // gpus
    for ranks in sorted({1, max(1, gpus // 4), max(1, gpus // 2), gpus}):
        place = bench.place()
        plan = bench.plan(place / "plan.json", model, ranks, tokens * ranks)
        if "error" in plan:
            yield {"case": f"{ranks} GPUs"} | plan
            continue
        command = moescale([*bench.run_options(place / "plan.json", model, place / "run"), "--no-final-checkpoint"])
        row = bench.measured(plan, command, place / "run")
        per_gpu = row["tokens_per_second"] and row["tokens_per_second"] / ranks
        alone = per_gpu if ranks == 1 else alone
        efficiency = per_gpu and alone and per_gpu / alone
        yield {"case": f"{ranks} GPUs"} | row | {"tokens_per_second_per_gpu": per_gpu, "efficiency": efficiency}


def resume(bench: Bench) -> Iterator[dict[str, Any]]:
    """Losses after a checkpoint of all GPUs went on with fewer, beside those of a run that was not stopped."""
    gpus, model, place = bench.options.gpus, bench.layers(4), bench.place()
    tokens = bench.tokens(8192 * gpus)
    ranks_of_plans = [count for count in (gpus, gpus // 2, gpus // 4) if count]
    files = {ranks: place / f"plan-{ranks}.json" for ranks in ranks_of_plans}
    for ranks, path in files.items():
        plan = bench.plan(path, model, ranks, tokens)
        if "error" in plan:
            yield {"case": f"a plan for {ranks}"} | plan
            return

    def finish(ranks: int, output: Path, steps: int) -> subprocess.CompletedProcess[str]:
        # A constant learning rate: a schedule would depend on how many steps are asked for.
        command = moescale([*bench.run_options(files[ranks], model, output), "--steps", str(steps)])
        command += ["--schedule", "constant"]
        left = max(1.0, bench.deadline - time.monotonic())
        return subprocess.run(command, capture_output=True, text=True, timeout=left)

    def losses(output: Path) -> list[float]:
        return [round(row["loss"], 5) for row in read_steps(output)]

    whole, stopped = place / "whole", place / "stopped"
    for output, steps in ((whole, 6), (stopped, 4)):
        done = finish(gpus, output, steps)
        row = {"case": f"{steps} steps on {gpus}", "status": done.returncode, "losses": losses(output)}
        yield row | {"error": done.stderr[-4000:] if done.returncode else None}
        if done.returncode:
            return
    for ranks in ranks_of_plans[1:]:
        output = place / f"resumed-{ranks}"
        shutil.copytree(stopped, output, copy_function=os.link)
        (output / "metrics.jsonl").unlink()
        shutil.copy2(stopped / "metrics.jsonl", output)
        done = finish(ranks, output, 6)
        row = {"case": f"4 steps on {gpus}, 2 more on {ranks}", "status": done.returncode, "losses": losses(output)}
        yield row | {"error": done.stderr[-4000:] if done.returncode else None}
    yield killed_rank(bench, files[gpus], model, place / "killed")


def killed_rank(bench: Bench, plan: Path, model: str, output: Path) -> dict[str, Any]:
    """Kill the last rank after the second step: how long the others take to end, and what the run says."""
    log = output.parent / f"{output.name}.log"
    command = [*bench.run_options(plan, model, output), "--steps", "1000", "--checkpoint-every", "0"]
    process = start(moescale([*command, "--no-final-checkpoint"]), log)
    try:
        while process.poll() is None and len(read_steps(output)) < 2 and time.monotonic() < bench.deadline:
            time.sleep(0.1)
        victim = rank_process(process.pid, bench.options.gpus - 1)
        row: dict[str, Any] = {"case": "the last rank is killed", "seconds_to_end": None}
        if victim is not None and process.poll() is None:
            os.kill(victim, signal.SIGKILL)
            begin = time.monotonic()
            process.wait(timeout=max(1.0, bench.deadline - begin))
            row["seconds_to_end"] = round(time.monotonic() - begin, 1)
        return row | {"status": process.poll(), "says": log.read_text()[-1500:]}
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
