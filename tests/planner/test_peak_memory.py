"""Predicted peaks against torch's memory tracker: the real model, divided by the runtime over a fake process group.

Fake tensors show every buffer but those that an operator makes and gives back inside; the prediction leaves out the
same (class ``inside operators``), and the context and slack of a real GPU's allocator. Sizes are those of
DeepSeek-Coder-V2-Lite with 6 of its 27 layers, which makes communication buffers weigh more than they do in the whole.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

import moescale.runtime.expert_parallel as expert_parallel
import moescale.runtime.mapping as mapping
from moescale.config import ModelConfig
from moescale.convert.hf_config import PRESETS, read_model_config
from moescale.errors import ConfigError
from moescale.lora import LoraSettings, parse_lora
from moescale.models.fp8_gemms import use_fp8
from moescale.models.lora import add_adapters, is_adapter
from moescale.models.transformer import Transformer, build_on_meta
from moescale.plan import LayerPlan, MeshShape, ParallelPlan, one_device_plan
from moescale.planner.axes.ep import ExpertParallel
from moescale.planner.cluster import load_cluster
from moescale.planner.memory import MemoryModel
from moescale.planner.moments import Moments
from moescale.planner.problem import Problem
from moescale.planner.request import PlanRequest
from moescale.planner.result import PlanResult
from moescale.planner.search import compile_plan
from moescale.planner.shares import rank_parameters
from moescale.planner.workload import build_workload
from moescale.runtime.layout import find_parts
from moescale.runtime.meshes import build_meshes
from moescale.runtime.optimizer import AdamW
from moescale.runtime.ranks import Ranks
from moescale.runtime.settings import TrainSettings

CONFIG = dataclasses.replace(read_model_config("deepseek-coder-v2-lite"), num_layers=6)
BLOCKS = {"moe_recompute": "block", "dense_recompute": "block"}
GATHERED = {"moe_reshard": "false", "dense_reshard": "false"}
ONE_GPU: dict[str, dict[str, str]] = {"one GPU": {}, "one GPU, blocks recomputed": BLOCKS}
EIGHT_GPUS: dict[str, dict[str, str]] = {
    "sharded": {"dp_shard": "8", "ep": "1"},
    "sharded, fp32 gradients": {"dp_shard": "8", "ep": "1", "gradient_dtype": "fp32"},
    "sharded, weights stay gathered": {"dp_shard": "8", "ep": "1", **GATHERED},
    "sharded, blocks recomputed": {"dp_shard": "8", "ep": "1", **BLOCKS},
    "sharded, experts recomputed": {"dp_shard": "8", "ep": "1", "moe_recompute": "experts"},
    "ep 8": {"dp_shard": "8", "ep": "8", "optimizer_state_dtype": "fp32", "master_weight_format": "fp32"},
    "ep 8, experts recomputed": {"dp_shard": "8", "ep": "8", "moe_recompute": "experts"},
    "ep 4, fp32 gradients": {"dp_shard": "8", "ep": "4", "gradient_dtype": "fp32"},
    "ep 2": {"dp_shard": "8", "ep": "2", "optimizer_state_dtype": "bf16"},
    "ep 4, blocks recomputed": {"dp_shard": "8", "ep": "4", **BLOCKS},
    "two replicas": {"dp_shard": "4", "ep": "1"},
    "two replicas, ep 4": {"dp_shard": "4", "ep": "4", "gradient_dtype": "fp32"},
    "four replicas, ep 2, blocks recomputed": {"dp_shard": "2", "ep": "2", "moe_recompute": "block"},
}
QUICK = ("one GPU", "ep 8")


@pytest.fixture
def fake_runtime(gpu_operators: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Balanced routing where the runtime would read counts, and shapes where it would run kernels."""

    def lay_out(self, pairs: Any) -> Any:
        rows, ranks = pairs.row_pair.numel(), pairs.received.shape[0]
        each = [rows // ranks] * ranks
        return expert_parallel.SlotOrder(
            slot_pair=pairs.row_pair,
            pair_slot=pairs.pair_row,
            slot_expert=pairs.row_pair.new_empty(rows),
            sent=each,
            received=each,
        )

    def sort_pairs(ids: torch.Tensor, num_experts: int, backend: str | None = None) -> tuple[torch.Tensor, ...]:
        sizes = (ids.numel(), ids.numel(), num_experts)
        return tuple(ids.new_empty(size, dtype=torch.int32) for size in sizes)

    def combine_rows(rows: torch.Tensor, pair_row: torch.Tensor, top_k: int, weights: Any = None) -> torch.Tensor:
        return rows.new_empty((pair_row.numel() // top_k, rows.shape[1]))

    def combine_rows_backward(grad: torch.Tensor, rows: torch.Tensor, row_pair: Any, weights: Any) -> Any:
        return torch.empty_like(rows), rows.new_empty(rows.shape[0], dtype=torch.float32)

    def order_by_pair(values: torch.Tensor, pair_row: torch.Tensor) -> torch.Tensor:
        return values.new_empty(pair_row.numel())

    operators = SimpleNamespace(
        combine_rows=combine_rows, combine_rows_backward=combine_rows_backward, order_by_pair=order_by_pair
    )
    monkeypatch.setattr(expert_parallel, "choose_backend", lambda *args: "triton")
    monkeypatch.setattr(expert_parallel, "sort_pairs", sort_pairs)
    monkeypatch.setattr(expert_parallel, "_row_operators", lambda backend: operators)
    monkeypatch.setattr(expert_parallel.SplitExchange, "lay_out", lay_out)
    # What is divided here is sent as it is, also between two ranks, whose exchange on GPUs is padded.
    monkeypatch.setattr(ExpertParallel, "row_factor", lambda self, batch: batch.problem.request.router_imbalance)
    monkeypatch.setattr(
        mapping,
        "choose_dispatcher",
        lambda model, plan, meshes: expert_parallel.AllToAllDispatcher(
            meshes.experts["ep"].get_group(), expert_parallel.SplitExchange()
        ),
    )


def plan_with(pins: dict[str, str], lora: LoraSettings | None = None, *, fp8_gemms: bool = False) -> PlanResult:
    gpus = 8 if pins.get("dp_shard") else 1
    defaults = {"moe_recompute": "none", "dense_recompute": "none", "gradient_dtype": "fp32" if lora else "bf16"}
    if gpus > 1:
        defaults |= {"moe_reshard": "true", "dense_reshard": "true"}
    request = PlanRequest(
        runtime_gpus=gpus,
        tokens_per_step=gpus * 4 * 2 * 2048,
        sequence_length=2048,
        router_imbalance=1.0,
        lora=lora,
        fp8_gemms=fp8_gemms,
        pins={"micro_batch_sequences": "4", **defaults, **pins},
    )
    return compile_plan(CONFIG, load_cluster("h200"), request, with_alternatives=False)


def predicted_bytes(result: PlanResult) -> float:
    """The peak over the moments, without what happens inside operators."""
    assert result.best is not None
    candidate = result.best.candidate
    model = MemoryModel(Problem(result.workload, result.cluster, result.request))
    moments = model.moments.breakdowns(
        candidate.mesh,
        candidate.micro_batch_sequences,
        candidate.layers,
        candidate.formats.gradient_dtype,
        gemms=candidate.gemms,
    )
    visible = (sum(size for name, size in parts.items() if name != "inside operators") for parts in moments.values())
    persistent = model.persistent(candidate.mesh, candidate.formats, gemms=candidate.gemms)
    return max(visible) + sum(size for name, size in persistent.items() if name != "context")


def tracked_bytes(config: ModelConfig, plan: ParallelPlan) -> int:
    """Peak of two micro-batches of rank 0, by torch's memory tracker."""
    ranks = Ranks(rank=0, size=plan.runtime_gpus)
    if ranks.size > 1:
        dist.init_process_group("fake", rank=0, world_size=ranks.size, store=FakeStore())
    try:
        meshes = build_meshes(plan, ranks, "cpu")
        model = build_on_meta(config, torch.bfloat16)
        mapping.apply_plan(model, plan, meshes)
        with FakeTensorMode(allow_non_fake_inputs=True):
            _give_fake_memory(model, divided=ranks.size > 1)
            use_fp8(model, experts=plan.expert_gemms == "fp8", dense=plan.dense_gemms == "fp8")
            optimizer = AdamW(
                model.named_parameters(),
                TrainSettings(),
                mapping.optimizer_format(plan),
                parts=find_parts(model, meshes),
                ranks=ranks,
            )
            optimizer.accumulate_in_gemms(model)
            return _track(model, optimizer, plan)
    finally:
        if ranks.size > 1:
            dist.destroy_process_group()


def _give_fake_memory(model: Transformer, *, divided: bool) -> None:
    if divided:
        model.to_empty(device="cpu")
        return
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)


def _track(model: Transformer, optimizer: AdamW, plan: ParallelPlan) -> int:
    states = [tensor for state in optimizer.states.values() for tensor in state.tensors().values()]
    tracker = MemTracker()
    copies = [tensor for copies in _fp8_copies(model) for tensor in copies]
    tracker.track_external(model, *optimizer.weights.values(), *optimizer._gradients.values(), *states, *copies)
    tokens = torch.zeros(plan.micro_batch_sequences, plan.sequence_length, dtype=torch.int64)
    with tracker, _hooks_on_trained_weights_alone():
        for last in (False, True):
            tracker.reset_mod_stats()
            mapping.sum_over_replicas_at_the_last(model, last=last)
            output = model(tokens, tokens)
            (output.loss_sum + output.aux_loss).backward()
            del output
    return max(tracker.get_tracker_snapshot("peak")[torch.device("cpu")].values())


def _fp8_copies(model: Transformer) -> Iterator[tuple[torch.Tensor, ...]]:
    for module in model.modules():
        for name in ("copies", "gate_up_copies", "down_copies"):
            if getattr(module, name, None) is not None:
                yield getattr(module, name)


@contextmanager
def _hooks_on_trained_weights_alone() -> Iterator[None]:
    """The tracker asks for hooks on every parameter, which torch refuses on frozen ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("register_hook", "register_post_accumulate_grad_hook"):
            register = getattr(torch.Tensor, name)

            def of_trained(tensor: torch.Tensor, hook: Any, register: Any = register) -> Any:
                return register(tensor, hook) if tensor.requires_grad else SimpleNamespace(remove=lambda: None)

            patch.setattr(torch.Tensor, name, of_trained)
        yield


def error_of(pins: dict[str, str], lora: LoraSettings | None = None) -> float:
    result = plan_with(pins, lora)
    return predicted_bytes(result) / tracked_bytes(CONFIG, result.plan()) - 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUICK)
def test_the_predicted_peak_is_that_of_the_tracker(name: str, fake_runtime: None) -> None:
    assert abs(error_of((ONE_GPU | EIGHT_GPUS)[name])) < 0.01


def slow_ones(names: Iterable[str], *slow: str) -> list:
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


FP8_PLANS = {
    "experts": {"expert_gemms": "fp8", "dense_gemms": "compute"},
    "dense": {"expert_gemms": "compute", "dense_gemms": "fp8"},
    "both": {"expert_gemms": "fp8", "dense_gemms": "fp8"},
    "both, experts recomputed": {"expert_gemms": "fp8", "dense_gemms": "fp8", "moe_recompute": "experts"},
    "both, blocks recomputed": {"expert_gemms": "fp8", "dense_gemms": "fp8", **BLOCKS},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", slow_ones(FP8_PLANS, "dense", "both", "both, experts recomputed"))
def test_the_predicted_peak_with_gemms_in_fp8_is_that_of_the_tracker(name: str, fake_runtime: None) -> None:
    result = plan_with(FP8_PLANS[name], fp8_gemms=True)
    error = predicted_bytes(result) / tracked_bytes(CONFIG, result.plan()) - 1
    assert abs(error) < 0.01, error


LORA_PLANS = {
    "one GPU": ("all", {}, 0.01),
    # Of frozen experts without adapters eager autograd makes a gradient of zeros for the pre-activation.
    "one GPU, attention": ("attention", {}, 0.02),
    "one GPU, blocks recomputed": ("all", BLOCKS, 0.01),
    "one GPU, fp8": ("all,base=fp8", {}, 0.01),
    "one GPU, blocks recomputed, fp8": ("all,base=fp8", BLOCKS, 0.01),
    "sharded": ("all", {"dp_shard": "8", "ep": "1"}, 0.06),
    "sharded, fp8": ("all,base=fp8", {"dp_shard": "8", "ep": "1"}, 0.06),
    "ep 8": ("attention+shared+experts", {"dp_shard": "8", "ep": "8"}, 0.06),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    slow_ones(
        LORA_PLANS,
        *("one GPU, attention", "one GPU, blocks recomputed", "one GPU, fp8", "sharded", "sharded, fp8"),
    ),
)
def test_the_predicted_peak_with_adapters_is_that_of_the_tracker(name: str, fake_runtime: None) -> None:
    targets, pins, tolerance = LORA_PLANS[name]
    error = error_of(pins, parse_lora(f"rank=16,targets={targets}"))
    assert abs(error) < tolerance, error


@pytest.mark.parametrize("targets", ["all", "attention", "experts", "dense+shared", "kv_up"])
@pytest.mark.parametrize("model", ["deepseek-coder-v2-lite", "deepseek-v2", "qwen3-30b-a3b"])
def test_adapters_are_counted_as_the_model_has_them(model: str, targets: str) -> None:
    config = dataclasses.replace(read_model_config(model), num_layers=3)
    if targets == "dense+shared" and not config.num_shared_experts or targets == "kv_up" and "qwen" in model:
        targets = "k_proj+v_proj"
    lora = parse_lora(f"rank=16,targets={targets}")
    built = build_on_meta(config, torch.bfloat16)
    add_adapters(built, lora)
    found = build_workload(config, lora=lora)
    trained = sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
    routed = sum(p.numel() for name, p in built.named_parameters() if ".experts.adapter." in name)
    assert (found.trained.others + found.trained.routed, found.trained.routed) == (trained, routed)
    assert found.parameters() + trained == sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize("base", ["compute", "fp8"])
@pytest.mark.parametrize("dtype, itemsize", [(torch.bfloat16, 2), (torch.float32, 4)], ids=["bf16", "fp32"])
@pytest.mark.parametrize("model", PRESETS)
def test_frozen_weights_take_the_bytes_that_the_model_has(
    model: str, dtype: torch.dtype, itemsize: int, base: str
) -> None:
    config = read_model_config(model)
    lora = parse_lora(f"rank=16,targets=attention,base={base}")
    built = build_on_meta(config, dtype)
    add_adapters(built, lora)
    sizes = {name: parameter.nbytes for name, parameter in built.named_parameters() if not is_adapter(name)}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    found = build_workload(config, lora=lora).stored(itemsize)
    assert (found.others + found.routed, found.routed) == (sum(sizes.values()), routed)


def plain_weights_at_the_peak(mesh: MeshShape, recompute: str) -> dict[str, float]:
    """By moment what operators make and give back with frozen weights in fp8, over that with plain ones."""
    inside = []
    for base in ("fp8", "compute"):
        lora = parse_lora(f"rank=16,base={base}")
        request = PlanRequest(runtime_gpus=8, tokens_per_step=8 * 2048, sequence_length=2048, lora=lora)
        moments = Moments(Problem(build_workload(CONFIG, lora=lora), load_cluster("h200"), request))
        kinds = [LayerPlan(kind=kind, recompute=recompute) for kind in ("dense", "moe")]
        found = moments.breakdowns(mesh, 1, tuple(kinds), "fp32")
        inside.append({moment: parts.get("inside operators", 0.0) for moment, parts in found.items()})
    return {moment: size - inside[1][moment] for moment, size in inside[0].items()}


def test_one_weight_at_a_time_is_plain_at_the_peak() -> None:
    """Of 64 experts: gate and up, once the activation of 6 rows a token has been given back, for a gradient."""
    gate_up, down, rows = (64 * 2048 * 1408 * 2 * 2, 64 * 2048 * 1408 * 2, 2048 * 6)
    whole = plain_weights_at_the_peak(MeshShape(), "none")
    assert whole["gradient of the last experts"] == gate_up + rows * (2048 - 1408) * 2
    divided = plain_weights_at_the_peak(MeshShape(dp_shard=8, ep=8), "none")
    assert divided["gradient of the last experts"] == gate_up / 8
    assert whole["loss"] == divided["loss"] == 0
    assert gate_up == 2 * down


def test_a_target_that_the_model_lacks_is_refused_by_the_planner_too() -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets \('shared'\) must be one of all, attention, experts"):
        build_workload(read_model_config("qwen3-30b-a3b"), lora=parse_lora("rank=8,targets=shared"))


LITE, V2 = "deepseek-coder-v2-lite", "deepseek-v2"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "gpus", "ep"), [(LITE, 7, 1), (LITE, 12, 2), (LITE, 96, 1), (LITE, 96, 4), (V2, 7, 1), (V2, 256, 1)]
)
def test_the_fullest_ranks_share_is_what_the_runtime_gives_it(model: str, gpus: int, ep: int) -> None:
    """Where experts do not divide by the ranks, too."""
    config = dataclasses.replace(read_model_config(model), num_layers=3)
    mesh = MeshShape(dp_shard=gpus, ep=ep)
    cut = dict(sequence_length=2048, micro_batch_sequences=1, gradient_accumulation_steps=1)
    plan = dataclasses.replace(
        one_device_plan(config, compute_dtype="bf16", **cut),
        plan_gpus=gpus,
        runtime_gpus=gpus,
        tokens_per_step=gpus * 2048,
        mesh=mesh,
    )
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        meshes = build_meshes(plan, Ranks(rank=0, size=gpus), "cpu")
        divided = build_on_meta(config, torch.bfloat16)
        mapping.apply_plan(divided, plan, meshes)
        parts = find_parts(divided, meshes).values()
    finally:
        dist.destroy_process_group()
    held = sum(math.prod(bounds.stop - bounds.start for bounds in part.index) for part in parts)
    # Other weights are rounded up to whole rows.
    assert rank_parameters(build_workload(config).weights, mesh) == pytest.approx(held, rel=2e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_over_many_plans_the_median_error_is_below_3_and_the_largest_below_6_percent(fake_runtime: None) -> None:
    errors = {name: error_of(pins) for name, pins in (ONE_GPU | EIGHT_GPUS).items()}
    sizes = [abs(error) for error in errors.values()]
    assert len(EIGHT_GPUS) >= 10
    assert statistics.median(sizes) < 0.03 and max(sizes) < 0.06, errors


def test_plans_that_ran_out_of_memory_on_two_h100_are_not_promised_to_fit() -> None:
    """FSDP2 with ep 2: at two sequences it failed at 77 GiB allocated, at one it took 73.6 (issue 19)."""
    config = read_model_config("deepseek-coder-v2-lite")
    pins = {"ep": "2", "dense_sharding": "fsdp", "moe_recompute": "none", "dense_recompute": "none"}
    pins |= {"optimizer_state_dtype": "int8", "master_weight_format": "bf16_remainder", "gradient_dtype": "bf16"}
    request = PlanRequest(
        runtime_gpus=2,
        plan_gpus=2,
        tokens_per_step=131072,
        sequence_length=2048,
        pins=pins | {"offload_optimizer": "false", "micro_batch_sequences": "2"},
    )
    cluster = load_cluster("h100-sxm")
    assert compile_plan(config, cluster, request, with_alternatives=False).best is None
    one = dataclasses.replace(request, pins=request.pins | {"micro_batch_sequences": "1"})
    best = compile_plan(config, cluster, one, with_alternatives=False).best
    assert best is not None
    assert best.memory.allocated / 2**30 == pytest.approx(73.6, rel=0.03)
