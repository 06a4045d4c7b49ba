"""The page's timeline: the seconds of the prediction, in the order of a step."""

from __future__ import annotations

import dataclasses

import pytest

from moescale.convert.hf_config import read_model_config
from moescale.planner.cluster import load_cluster
from moescale.planner.explain import explain_html
from moescale.planner.request import PlanRequest
from moescale.planner.result import PlanResult
from moescale.planner.search import compile_plan
from moescale.planner.timeline import step_timeline

REQUEST = PlanRequest(runtime_gpus=8, plan_gpus=4, tokens_per_step=131072, sequence_length=2048)
UNSUPPORTED = {"plan_gpus": 8, "allow_unsupported": True}


def planned(**changes) -> PlanResult:
    request = dataclasses.replace(REQUEST, **changes)
    return compile_plan(read_model_config("deepseek-coder-v2-lite"), load_cluster("h100-sxm"), request)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pins": {"ep": "4"}},
        {"pins": {"moe_recompute": "block"}},
        {"runtime_gpus": 1, "plan_gpus": 1},
        {"runtime_gpus": 1, "plan_gpus": 1, "fp8_gemms": True, "pins": {"dense_gemms": "fp8"}},
        UNSUPPORTED | {"pins": {"pp": "2", "cp": "2"}},
        UNSUPPORTED | {"pins": {"tp": "2"}},
    ],
)
def test_the_spans_fill_the_step_and_the_lanes_hold_what_is_hidden(changes: dict) -> None:
    result = planned(**changes)
    best = result.best
    assert best is not None
    timeline = step_timeline(result, best)
    at = 0.0
    for span in timeline.spans:
        assert span.start == pytest.approx(at)
        at = span.end
    assert at == pytest.approx(best.time.total)
    hidden = {name: sum(span.seconds for span in spans) for name, spans in timeline.hidden.items()}
    assert hidden == pytest.approx({name: seconds for name, seconds in best.time.hidden.items() if seconds > 0})


def test_the_order_is_that_of_a_step() -> None:
    result = planned(pins={"moe_recompute": "block", "ep": "4"})
    assert result.best is not None
    timeline = step_timeline(result, result.best)
    names = [span.name for span in timeline.spans]
    order = [
        *("forward, dense layers", "forward, moe layers", "embedding and loss", "recompute"),
        *("backward, moe layers", "backward, dense layers", "optimizer", "step overhead"),
    ]
    assert [name for name in names if name in order] == order
    spans = {span.name: span for span in timeline.spans}
    forward, backward = timeline.hidden["communication ep"]
    assert forward.start == spans["forward, moe layers"].start and backward.start == spans["backward, moe layers"].start
    assert timeline.hidden["communication dp_replicate"][-1].end == pytest.approx(spans["backward, dense layers"].end)


def test_the_page_draws_the_spans_in_order_and_the_hidden_communication() -> None:
    result = planned(pins={"ep": "4", "dense_sharding": "fsdp"})
    page = explain_html(result)
    page = page[page.index("<h2>One step") :]
    parts = ("forward, moe layers: ", "embedding and loss: ", "backward, moe layers: ", "optimizer: ")
    assert sorted(parts, key=page.index) == list(parts)
    assert "communication ep, hidden</small>" in page and 'title="beneath forward, moe layers: ' in page
