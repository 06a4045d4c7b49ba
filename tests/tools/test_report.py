"""`moescale report`: what its pages say of healthy, collapsed, interrupted and compared runs, and to a browser."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moescale.cli import main
from moescale.config import ModelConfig
from moescale.files import lock_file
from moescale.plan import ParallelPlan
from moescale.planner.cluster import load_cluster
from moescale.planner.request import PlanRequest
from moescale.planner.search import compile_plan
from moescale.report.metrics import StepMetrics
from moescale.report.observer import RunContext
from moescale.report.observers.expert_load import ExpertLoad
from moescale.report.observers.json_lines import JsonLines
from moescale.report.observers.warnings import Warnings
from moescale.report.registry import ObserverList
from moescale.runtime.settings import TrainSettings
from moescale.tools.report import figures
from moescale.tools.report.run_data import read_run
from tiny import tiny_config

GIB = 2**30
STEPS = 120
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def plan() -> ParallelPlan:
    config: ModelConfig = tiny_config()
    request = PlanRequest(runtime_gpus=1, tokens_per_step=4096, sequence_length=256)
    return compile_plan(config, load_cluster("h100-sxm"), request).plan()


def loads(step: int, collapsed: bool) -> list[list[float]]:
    if not collapsed:
        return [[1 + 0.3 * math.sin(step + expert + layer) for expert in range(16)] for layer in range(3)]
    return [[1.0] * 16, [1.0] * 16, [min(7.0, 1 + step / 10)] + [0.0] * 4 + [0.8] * 11]


def write_run(
    folder: Path, plan: ParallelPlan, *, steps: int = STEPS, collapsed: bool = False, rate: float = 3e-4
) -> Path:
    """A run's folder as the observers write it, on a GPU that is as fast as the plan says."""
    folder.mkdir(parents=True)
    settings = dataclasses.replace(TrainSettings(), steps=STEPS, learning_rate=rate)
    document: dict[str, Any] = {
        "moescale": "0.1.0",
        "model": "<my model>",
        "data": "corpus",
        "settings": dataclasses.asdict(settings),
        "plan": json.loads(plan.to_json()),
    }
    (folder / "run.json").write_text(json.dumps(document))
    observers = ObserverList([JsonLines(), ExpertLoad(), Warnings()])
    context = RunContext(
        folder=folder,
        total_steps=STEPS,
        flops_per_token=1e6,
        peak_flops=1e15,
        document=document,
        console=Console(file=io.StringIO()),
        experts_per_token=2,
        device_bytes=80 * GIB,
    )
    assert plan.prediction is not None
    with observers:
        observers.on_start(context)
        for step in range(1, steps + 1):
            observers.on_step(
                StepMetrics(
                    step=step,
                    loss=2 + 4 / step**0.5 + random.Random(step).uniform(-0.02, 0.02),
                    aux_loss=1.0,
                    learning_rate=rate,
                    gradient_norm=1 / step**0.5,
                    tokens=4096,
                    step_seconds=plan.prediction.step_seconds,
                    peak_bytes=GIB,
                    expert_load=loads(step, collapsed),
                )
            )
            if step % 40 == 0:
                observers.on_validation(step, 2.1 + 4 / step**0.5)
                observers.on_checkpoint(step, folder / f"step-{step}", 0.1)
    return folder


class Text(HTMLParser):
    """The text of a page outside its style, and the tables by their id."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self._is_style = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self._is_style = tag == "style"

    def handle_endtag(self, tag):
        self._is_style = False

    def handle_data(self, data):
        if not self._is_style:
            self.words.append(data)

    def __str__(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(*folders: Path) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["report", *map(str, folders)])
    assert caught.value.code == 0
    return (folders[0] / "report.html").read_text()


@pytest.fixture(scope="module")
def healthy_page(tmp_path_factory, plan) -> str:
    return page_of(write_run(tmp_path_factory.mktemp("healthy") / "first", plan))


def test_a_healthy_run_shows_its_figures_curves_plan_and_no_warning(healthy_page):
    page = healthy_page
    text = str(Text(page))
    assert "finished" in text and "120 of 120" in text and "Warnings None." in text
    assert "validation loss" in text and "last checkpoint step 120" in text
    for caption in (
        "Loss",
        "Tokens per second",
        "Expert load at the end",
        "Memory of a GPU at the peak",
        "A step's time",
    ):
        assert caption in text
    assert "instead of" in text and "int8" in text
    assert page.count("<svg") == page.count("</svg>") >= 9


def test_the_page_is_alone_and_takes_its_colours_from_one_place(healthy_page):
    page = healthy_page
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page.replace('xlink:href="#', ""))
    assert "@import" not in page and "<script" not in page
    assert not any(stand_in in page for stand_in in figures.STAND_INS)
    assert "&lt;my model&gt;" in page and "<my model>" not in page


def test_a_collapsed_router_is_warned_of_and_its_experts_are_named(tmp_path, plan):
    text = str(Text(page_of(write_run(tmp_path / "collapsed", plan, collapsed=True))))
    assert "dead experts" in text and "4 of 16 experts of MoE layer 2" in text
    assert "collapsed router" in text and "choose expert 0 of MoE layer 2" in text
    assert "Experts to look at" in text and "1, 2, 3, 4 0 7.0" in text


def test_a_run_that_was_interrupted_and_one_that_still_goes_say_so(tmp_path, plan):
    folder = write_run(tmp_path / "short", plan, steps=50)
    with lock_file(folder / "run.lock"):
        assert read_run(folder).state == "running"
    assert read_run(folder).state == "ended"
    text = str(Text(page_of(folder)))
    assert "ended before its last step" in text and "50 of 120" in text


def test_a_run_that_has_only_begun_has_a_page(tmp_path, plan):
    folder = write_run(tmp_path / "new", plan, steps=0)
    assert "No step has been recorded yet" in str(Text(page_of(folder)))


def test_a_last_line_cut_short_is_left_out(tmp_path, plan):
    folder = write_run(tmp_path / "first", plan)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 121, "lo')
    with (folder / "expert_load.jsonl").open("a") as file:
        file.write('{"step": 12')
    assert read_run(folder).last_step == STEPS
    page_of(folder)


def test_two_runs_are_compared_by_what_differs(tmp_path, plan):
    other = dataclasses.replace(plan, optimizer_state_dtype="fp32")
    first, second = write_run(tmp_path / "a", plan), write_run(tmp_path / "b", other, rate=1e-3, steps=60)
    text = str(Text(page_of(first, second)))
    assert "run.learning_rate 0.0003 0.001" in text
    assert f"plan.optimizer_state_dtype {plan.optimizer_state_dtype} fp32" in text
    assert "run.weight_decay" not in text.split("Configuration")[0]
    assert "a: finished b: ended before its last step" in text


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["report", str(tmp_path)])
    assert caught.value.code == 2
    assert f"{tmp_path}/run.json: missing; give the folder that was --output" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    "load", [[], [[]], [[1, 1], [1, 1, 1]], [[1] * 16], [[1] * 15] * 3, [[-1] + [1] * 15] * 3, [[1e6] * 16] * 3]
)
def test_loads_that_no_model_has_are_refused(tmp_path, plan, load, capsys):
    folder = write_run(tmp_path / "first", plan, steps=3)
    with (folder / "expert_load.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "load": load}) + "\n")
    with pytest.raises(SystemExit) as caught:
        main(["report", str(folder)])
    assert caught.value.code == 2 and "expert_load.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_numbers_that_no_run_has_are_damage_and_the_largest_others_are_drawn(tmp_path, plan):
    folder = write_run(tmp_path / "first", plan, steps=12)
    with (folder / "metrics.jsonl").open("a") as file:
        for value in (1e308, -1e308, 1e31):
            file.write(json.dumps({"step": 13, "loss": value}) + "\n")
        for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "mfu", "peak_bytes"):
            for value in (1e30, -1e30, 1e-320, 0.0):
                file.write(json.dumps({"step": 2**62, "loss": 1.0, name: value}) + "\n")
        file.write('{"step": 14, "validation_loss": 1e30}\n{"step": 15, "validation_loss": -1e30}\n')
    assert "damaged lines of metrics 3" in str(Text(page_of(folder)))


def test_a_folder_of_any_name_has_a_page(tmp_path, plan):
    first = write_run(tmp_path / os.fsdecode(b"_$\\frac{$\xff\x1b"), plan, steps=2)
    document = json.loads((first / "run.json").read_text()) | {"data": "/data/\udcff"}
    (first / "run.json").write_text(json.dumps(document))
    assert "\\xff\\x1b" in page_of(first, first)
    assert "/data/\\udcff" in page_of(first)


def test_what_is_in_the_place_of_a_lock_is_not_waited_for(tmp_path, plan):
    folder = write_run(tmp_path / "first", plan, steps=2)
    os.mkfifo(folder / "run.lock")
    assert read_run(folder).state == "ended"


def test_a_line_too_long_for_a_record_is_not_read(tmp_path, plan):
    folder = write_run(tmp_path / "first", plan, steps=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("[" * 2**21 + '\n{"step": 3, "loss": 1.0}\n')
    assert read_run(folder).last_step == 3


def test_long_curves_are_thinned_by_means():
    steps, values = figures.thinned(range(1, 10_001), [float(step) for step in range(1, 10_001)])
    assert len(steps) <= figures.MAX_POINTS and values == steps
    assert steps[0] == pytest.approx(7) and steps[-1] > 9_990


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser_nothing_is_wider_than_the_screen_and_plots_have_a_size(tmp_path, plan, width):
    page = page_of(write_run(tmp_path / "first", plan, collapsed=True))
    probe = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({"
        "wide: document.documentElement.scrollWidth, seen: innerWidth,"
        "plots: [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height > 60),"
        "ink: getComputedStyle(document.querySelector('svg text')).fill}) })</script>"
    )
    (tmp_path / "probed.html").write_text(page.replace("</body>", probe + "</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "probed.html").as_uri()], capture_output=True, text=True, timeout=60)
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1].replace("&quot;", '"'))
    assert found["wide"] <= found["seen"], found
    assert all(found["plots"]) and len(found["plots"]) >= 9
    assert found["ink"] != "rgb(1, 2, 3)", "the stand-in is still there"


def test_samples_are_shown_with_the_steps_between_the_first_and_the_last(tmp_path, plan):
    folder = write_run(tmp_path / "first", plan)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(1, 21):
            sample = {"sequence": 3, "prompt": "<|user|>Why?", "answer": f"answer {step}", "wanted": "Because."}
            other = sample | {"sequence": 5, "prompt": "Who?", "answer": "me"}
            file.write(json.dumps({"step": step, "samples": [sample, other]}) + "\n")
    page = page_of(folder)
    rows = Text(page[page.index('id="samples"') : page.index("</table>", page.index('id="samples"'))])
    shown = re.findall(r"step (\d+) answer (\d+)", str(rows))
    assert len(shown) == 6 and shown[0] == ("1", "1") and shown[-1] == ("20", "20")
    assert "prompt <|user|>Why?" in str(rows) and str(rows).count("corpus Because.") == 2
    assert "&lt;|user|&gt;Why?" in page


def test_a_run_without_samples_has_no_such_part(healthy_page):
    assert "Samples" not in str(Text(healthy_page))
