"""Times routed experts in fp8 against the bf16 Triton back end on one Hopper GPU, and judges their errors.

    python benchmarks/fp8/fp8_measure.py --output fp8_experts.json [--sections numerics,products,mlp,layer,parts]

Shapes are the six of the reference, and random data. At each shape the fp8 launches are tuned first, as those of bf16
are in their table. ``mlp``: expert MLP on sorted rows, forward and backward, with rows and gradients quantised inside.
``layer``: from tokens to tokens, with sort, gather and sum. Variants of fp8: weight gradients in fp8 or bf16; weights
quantised before (once a step) or in every forward. Times are medians of alternating rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import fp8_experts as fp8
import fp8_quantise as quantise
from fp8_gemm import LARGE, SMALL, Scaled, multiply_rows, weight_gradient
from fp8_recipe import Exact, block_quantise, relative_error
from moescale.kernels.experts import expert_mlp, experts
from moescale.kernels.experts import triton as bf16
from moescale.kernels.experts.launch_config import KERNELS, LaunchConfig, load_tables
from moescale.kernels.experts.row_tiles_triton import RowGroups, group_rows
from moescale.kernels.experts.sort import sort_pairs
from moescale.tools.bench_experts import Contender, choose_experts, differentiated, forward_backward_flops
from moescale.tools.measurement import describe_measurement, write_result
from moescale.tools.tune_experts import LITE_SHAPES, ExpertShape, measure_ms

SLEEP_CYCLES = 12_000_000
"""About 6 ms: longer than the host needs to queue a forward or backward."""
DEVICE = "cuda"
ROUNDS = 5
SMALL_FOUR_WARPS = dataclasses.replace(SMALL, num_warps=4)
CANDIDATES = {
    "128x256": LARGE,
    "128x256, 8 row tiles": dataclasses.replace(LARGE, group_m=8),
    "128x256, 1 row tile": dataclasses.replace(LARGE, group_m=1),
    "128x128, two": SMALL_FOUR_WARPS,
}
PROMOTED = {"128x256": LARGE, "128x128, two": SMALL_FOUR_WARPS}
BLOCKS = {
    "128x128, eight warps": dataclasses.replace(SMALL, programs_per_sm=1, num_stages=4, flatten=False),
    "128x128, two": dataclasses.replace(SMALL_FOUR_WARPS, flatten=False),
}
# Weight gradients; whether weights are quantised in each forward instead of once a step.
VARIANTS = (("fp8", False), ("fp8", True), ("bf16", False), ("none", False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Random operands of the expert MLP at one shape, in bf16, and the fp8 weights."""

    shape: ExpertShape
    rows: torch.Tensor
    grad: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    largest: tuple[torch.Tensor, torch.Tensor]
    ends: torch.Tensor

    @classmethod
    def random(cls, shape: ExpertShape, routing: str = "uniform") -> Inputs:
        """Draw rows and gradients of unit variance, weights of standard deviation 0.02."""
        hidden, ffn, num_experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
        *_, ends = sort_pairs(choose_experts(shape, routing), num_experts)
        gate_up, down = randn(num_experts, 2 * ffn, hidden) * 0.02, randn(num_experts, hidden, ffn) * 0.02
        return cls(
            shape=shape,
            rows=randn(shape.rows, hidden),
            grad=randn(shape.rows, hidden),
            gate_up=gate_up,
            down=down,
            largest=fp8.largest_elements(gate_up, down),
            ends=ends,
        )

    def fp8_weights(self) -> fp8.Weights:
        """Quantise both weights; their largest elements are known."""
        return fp8.Weights.of(self.gate_up, self.down, self.largest)

    @property
    def groups(self) -> RowGroups:
        """The experts' rows; a new object, for the tables of tiles it keeps are part of what is timed."""
        return group_rows(self.ends, self.shape.rows)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def product_flops(shape: ExpertShape, product: str) -> float:
    """FLOPs of one of the six products: those of ``up`` are of 2F columns."""
    return 2.0 * shape.rows * shape.hidden_size * shape.intermediate_size * (2 if product.startswith("up") else 1)


def fp8_products(inputs: Inputs, weights: fp8.Weights) -> dict[str, Callable[..., torch.Tensor]]:
    """Return the six products with row scales by name, to call with a launch and ``imprecise``."""
    shape, groups = inputs.shape, inputs.groups
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    padded = quantise.pad_ends(inputs.ends)
    x, act, pre = (quantise.quantise_rows(t) for t in (inputs.rows, randn(shape.rows, ffn), randn(shape.rows, 2 * ffn)))
    x_t, act_t, pre_t = (quantise.transpose_rows(t, inputs.ends, padded) for t in (x, act, pre))

    def rows(a: Scaled, weight: Scaled, n: int, transposed: bool = False) -> Callable[..., torch.Tensor]:
        return functools.partial(multiply_rows, a, weight, groups, n, transposed=transposed)

    return {
        "up": rows(x, weights.gate_up, 2 * ffn),
        "down": rows(act, weights.down, hidden),
        "down_dgrad": rows(x, weights.down_transposed, ffn, True),
        "up_dgrad": rows(pre, weights.gate_up_transposed, hidden, True),
        "up_wgrad": functools.partial(weight_gradient, pre_t, x_t, padded),
        "down_wgrad": functools.partial(weight_gradient, x_t, act_t, padded),
    }


def bf16_products(inputs: Inputs) -> dict[str, Callable[[], torch.Tensor]]:
    """The same in bf16, as the back end calls them, with the launches of its table."""
    shape, groups = inputs.shape, inputs.groups
    x, act, pre = (
        inputs.rows,
        randn(shape.rows, shape.intermediate_size),
        randn(shape.rows, 2 * shape.intermediate_size),
    )
    return {
        "up": lambda: bf16.multiply_up(x, inputs.gate_up, groups, write_pre=True, write_act=True)[0],
        "down": lambda: bf16.multiply_rows(act, inputs.down, groups),
        "down_dgrad": lambda: bf16.multiply_rows(x, inputs.down, groups, transposed=True, kernel="down_dgrad"),
        "up_dgrad": lambda: bf16.multiply_rows(pre, inputs.gate_up, groups, transposed=True, kernel="up_dgrad"),
        "up_wgrad": lambda: bf16.weight_gradient(pre, x, groups, kernel="up_wgrad"),
        "down_wgrad": lambda: bf16.weight_gradient(x, act, groups),
    }


def block_products(inputs: Inputs) -> dict[str, Callable[..., torch.Tensor]]:
    """Products of rows in the block scaling, on operands quantised in plain torch."""
    shape, groups = inputs.shape, inputs.groups

    def product(rows: torch.Tensor, weight: torch.Tensor) -> Callable[..., torch.Tensor]:
        a, b = block_quantise(rows), block_quantise(weight, rows=128)
        a = Scaled(data=a.data, scales=a.scales.T.contiguous())
        return functools.partial(multiply_rows, a, b, groups, weight.shape[1], scaling="block")

    act, pre = randn(shape.rows, shape.intermediate_size), randn(shape.rows, 2 * shape.intermediate_size)
    return {
        "up": product(inputs.rows, inputs.gate_up),
        "down": product(act, inputs.down),
        "down_dgrad": product(inputs.grad, inputs.down.transpose(1, 2).contiguous()),
        "up_dgrad": product(pre, inputs.gate_up.transpose(1, 2).contiguous()),
    }


def time_rounds(calls: dict[Any, Callable[[], object]], rounds: int = ROUNDS) -> dict[Any, float]:
    """Return the median milliseconds of each call, of ``rounds`` rounds in which they take turns."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            times[key].append(measure_ms(call, runs=3, sleep_cycles=SLEEP_CYCLES // 4))
    return {key: statistics.median(values) for key, values in times.items()}


def measure_products(inputs: Inputs, weights: fp8.Weights, forms: bool) -> tuple[list[dict], dict[str, LaunchConfig]]:
    """Time every launch of every product. Return the rows of the result and the fastest launch with row scales.

    ``forms``: also sums promoted every 128, and block scales.
    """
    calls: dict[tuple[str, str, str], Callable[[], object]] = {}
    for name, call in bf16_products(inputs).items():
        calls[name, "bf16", "table"] = call
    for name, call in fp8_products(inputs, weights).items():
        for tile, launch in CANDIDATES.items():
            calls[name, "row", tile] = functools.partial(call, launch=launch)
        for tile, launch in PROMOTED.items() if forms else ():
            calls[name, "row, promoted", tile] = functools.partial(call, launch=launch, imprecise=128)
    for name, call in block_products(inputs).items() if forms else ():
        for tile, launch in BLOCKS.items():
            calls[name, "block", tile] = functools.partial(call, launch=launch)
    times = time_rounds(calls, rounds=3)
    rows = [
        describe(inputs.shape, "product", form, product=name, launch=tile, ms=round(ms, 4))
        | {"tflops": round(product_flops(inputs.shape, name) / ms / 1e9, 1)}
        for (name, form, tile), ms in times.items()
    ]
    best = {
        name: CANDIDATES[min((ms, tile) for (n, form, tile), ms in times.items() if (n, form) == (name, "row"))[1]]
        for name in KERNELS
    }
    return rows, best


def describe(shape: ExpertShape, scope: str, form: str, **fields: Any) -> dict[str, Any]:
    return {"scope": scope, "tokens": shape.tokens, "num_experts": shape.num_experts, "form": form, **fields}


def mlp_contenders(inputs: Inputs, weights: fp8.Weights, launches: dict[str, LaunchConfig]) -> list[Contender]:
    """The MLP on sorted rows: bf16, and fp8 with everything that fp8 adds."""
    leaves = tuple(t.detach().requires_grad_() for t in (inputs.rows, inputs.gate_up, inputs.down))
    baseline = functools.partial(expert_mlp, *leaves, inputs.ends, backend="triton")
    frozen = functools.partial(expert_mlp, leaves[0], inputs.gate_up, inputs.down, inputs.ends, backend="triton")

    def contender(gradients: str, weights_each_time: bool) -> Contender:
        settings = fp8.Settings(weight_gradients=gradients, launches=launches)

        def forward() -> Any:
            own = inputs.fp8_weights() if weights_each_time else weights
            groups = inputs.groups
            rows = fp8.Rows(scaled=quantise.quantise_rows(inputs.rows), wide=inputs.rows)
            return fp8.forward(rows, own, groups, settings), own, groups

        def backward(result: Any, _retain: bool) -> object:
            (_, saved), own, groups = result
            grad = fp8.Rows(scaled=quantise.quantise_rows(inputs.grad), wide=inputs.grad)
            return fp8.backward(grad, saved, own, groups, None, settings)

        return Contender(backend=variant(gradients, weights_each_time), forward=forward, backward=backward)

    return [
        differentiated("bf16", baseline, leaves, inputs.grad),
        differentiated("bf16, frozen weights", frozen, leaves[:1], inputs.grad),
        *(contender(*choices) for choices in VARIANTS),
    ]


def layer_contenders(inputs: Inputs, weights: fp8.Weights, launches: dict[str, LaunchConfig]) -> list[Contender]:
    """From tokens and routing to tokens: in fp8 a token's row is quantised once and gathered in fp8."""
    shape = inputs.shape
    ids = choose_experts(shape, "uniform")
    routing = torch.rand(ids.shape, device=DEVICE).softmax(1)
    x, grad = randn(shape.tokens, shape.hidden_size), randn(shape.tokens, shape.hidden_size)
    leaves = tuple(t.detach().requires_grad_() for t in (x, routing, inputs.gate_up, inputs.down))

    def baseline() -> torch.Tensor:
        return experts(leaves[0], ids, *leaves[1:], backend="triton")

    def frozen() -> torch.Tensor:
        return experts(leaves[0], ids, leaves[1], inputs.gate_up, inputs.down, backend="triton")

    def contender(gradients: str, weights_each_time: bool) -> Contender:
        settings = fp8.Settings(weight_gradients=gradients, launches=launches)

        def forward() -> Any:
            own = inputs.fp8_weights() if weights_each_time else weights
            row_pair, pair_row, ends = sort_pairs(ids, shape.num_experts, backend="triton")
            groups = group_rows(ends, shape.rows)
            rows = fp8.Rows.gathered(x, row_pair, pair_row, shape.top_k)
            out, saved = fp8.forward(rows, own, groups, settings)
            return bf16.combine_rows(out, pair_row, shape.top_k, routing), saved, own, groups, row_pair, pair_row

        def backward(result: Any, _retain: bool) -> object:
            _, saved, own, groups, row_pair, pair_row = result
            grad_rows = fp8.Rows.gathered(grad, row_pair, pair_row, shape.top_k)
            if gradients == "bf16":
                gather = functools.partial(bf16.gather_rows, row_pair=row_pair, pair_row=pair_row, top_k=shape.top_k)
                grad_rows = dataclasses.replace(grad_rows, wide=gather(grad))
                saved = dataclasses.replace(saved, rows=dataclasses.replace(saved.rows, wide=gather(x)))
            row_weights = bf16.sort_weights(routing, row_pair)
            found = fp8.backward(grad_rows, saved, own, groups, row_weights, settings)
            grad_x = bf16.combine_rows(found["grad_rows"], pair_row, shape.top_k)
            return grad_x, bf16.order_by_pair(found["grad_weights"], pair_row), found

        return Contender(backend=variant(gradients, weights_each_time), forward=forward, backward=backward)

    return [
        differentiated("bf16", baseline, leaves, grad),
        differentiated("bf16, frozen weights", frozen, leaves[:2], grad),
        *(contender(*choices) for choices in VARIANTS),
    ]


def layer_differences(baseline: Contender, ours: Contender, shape: ExpertShape) -> dict:
    """How far fp8's result and gradients are from bf16's, relative to these: what fp8 errs, if all is wired well."""
    expected = baseline.forward()
    grads = baseline.backward(expected, False)
    result = ours.forward()
    grad_x, grad_routing, found = ours.backward(result, False)
    pairs = {
        "out": (result[0], expected),
        "grad_x": (grad_x, grads[0]),
        "grad_routing": (grad_routing.view_as(grads[1]), grads[1]),
        "grad_gate_up": (found["grad_gate_up"][0], grads[2][0]),
        "grad_down": (found["grad_down"][0], grads[3][0]),
    }
    return describe(shape, "layer, difference to bf16", ours.backend) | {
        name: relative_error(a.detach(), b.detach()) for name, (a, b) in pairs.items()
    }


def variant(gradients: str, weights_each_time: bool) -> str:
    name = {"fp8": "fp8", "bf16": "fp8, weight gradients in bf16", "none": "fp8, frozen weights"}[gradients]
    return name + (", weights quantised each time" if weights_each_time else "")


def measure_contenders(contenders: list[Contender], shape: ExpertShape, scope: str) -> list[dict]:
    """Time forward and backward of each in turn.

    ``speedup``: bf16's sum of both over this one's, with frozen weights on both sides or on none; ``peak_bytes``:
    allocated at most above what was there, inputs and copies of weights, with what the forward saves and gradients.
    """
    samples: dict[str, list[tuple[float, float]]] = {c.backend: [] for c in contenders}
    peaks = {contender.backend: peak_bytes(contender) for contender in contenders}
    for _ in range(ROUNDS):
        for contender in contenders:
            forward_ms = measure_ms(contender.forward, runs=3, sleep_cycles=SLEEP_CYCLES)
            out = contender.forward()
            backward = functools.partial(contender.backward, out, True)
            samples[contender.backend].append((forward_ms, measure_ms(backward, runs=3, sleep_cycles=SLEEP_CYCLES)))
            del out, backward
    medians = {name: [statistics.median(c) for c in zip(*times, strict=True)] for name, times in samples.items()}
    rows = []
    for name, (forward_ms, backward_ms) in medians.items():
        frozen = name.endswith("frozen weights")
        baseline = sum(medians["bf16, frozen weights" if frozen else "bf16"])
        milliseconds = forward_ms + backward_ms
        flops = forward_backward_flops(shape) * (2 / 3 if frozen else 1)
        rows.append(
            describe(shape, scope, name, forward_ms=round(forward_ms, 4), backward_ms=round(backward_ms, 4))
            | {
                "tflops": round(flops / milliseconds / 1e9, 1),
                "speedup": round(baseline / milliseconds, 3),
                "peak_bytes": peaks[name],
            }
        )
    return rows


def peak_bytes(contender: Contender) -> int:
    """Return what a forward and backward allocate at most; the first of two also compiles."""
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contender.backward(contender.forward(), False)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_parts(inputs: Inputs) -> list[dict]:
    """Time what is not a product, with the bytes it must move: read and written once."""
    shape = inputs.shape
    rows, hidden, ffn, tokens = shape.rows, shape.hidden_size, shape.intermediate_size, shape.tokens
    row_pair, pair_row, ends = sort_pairs(choose_experts(shape, "uniform"), shape.num_experts)
    x, pre, grad_act = randn(tokens, hidden), randn(rows, 2 * ffn), randn(rows, ffn)
    scaled, scaled_pre = quantise.quantise_rows(inputs.rows), quantise.quantise_rows(pre)
    padded, row_weights = quantise.pad_ends(ends), torch.rand(rows, device=DEVICE)
    gathered = fp8.Rows.gathered(x, row_pair, pair_row, shape.top_k)
    wide = 3 * shape.num_experts * hidden * ffn
    parts: dict[str, tuple[Callable[[], object], float]] = {
        "quantise rows": (lambda: quantise.quantise_rows(inputs.rows), 3.0 * rows * hidden),
        "gather and quantise": (
            lambda: quantise.gather_rows(x, pair_row, shape.top_k),
            3.0 * tokens * hidden + rows * hidden,
        ),
        "gather in bf16": (
            lambda: bf16.gather_rows(x, row_pair, pair_row, shape.top_k),
            2.0 * tokens * hidden + 2 * rows * hidden,
        ),
        "SwiGLU": (lambda: quantise.swiglu(pre), 5.0 * rows * ffn),
        "SwiGLU backward": (lambda: quantise.swiglu_backward(grad_act, pre, None), 8.0 * rows * ffn),
        "SwiGLU backward, weighted": (lambda: quantise.swiglu_backward(grad_act, pre, row_weights), 9.0 * rows * ffn),
        "SwiGLU backward, bf16 too": (
            lambda: quantise.swiglu_backward(grad_act, pre, None, wide=True),
            14.0 * rows * ffn,
        ),
        "transpose rows of H": (lambda: quantise.transpose_rows(scaled, ends, padded), 2.0 * rows * hidden),
        "transpose rows of 2F": (lambda: quantise.transpose_rows(scaled_pre, ends, padded), 4.0 * rows * ffn),
        "transpose rows of tokens": (
            lambda: gathered.transposed(ends, padded),
            1.0 * tokens * hidden + rows * hidden,
        ),
        "quantise weights": (inputs.fp8_weights, 4.0 * wide),
    }
    times = time_rounds({name: call for name, (call, _) in parts.items()})
    return [
        describe(shape, "part", name, ms=round(ms, 4), gigabytes_per_second=round(parts[name][1] / ms / 1e6))
        for name, ms in times.items()
    ]


def judged_inputs(kind: str) -> Inputs:
    """Small inputs of the real widths: Gaussian, or with outlying channels, rows of all magnitudes, uneven experts."""
    shape = dataclasses.replace(LITE_SHAPES[0], tokens=1024, num_experts=8)
    inputs = Inputs.random(shape)
    if kind == "gaussian":
        return inputs
    counts = torch.tensor([3000, 0, 1, 1500, 643, 0, 999, 1], device=DEVICE) * shape.rows // 6144
    channels = torch.ones(shape.hidden_size, device=DEVICE)
    magnitudes = torch.randn(shape.rows, 1, device=DEVICE).exp()
    outlying = torch.arange(0, shape.hidden_size, 256, device=DEVICE)
    gate_up = (inputs.gate_up * torch.randn(shape.hidden_size, device=DEVICE).mul(0.5).exp() / 8).bfloat16()
    return dataclasses.replace(
        inputs,
        rows=(inputs.rows * channels.index_fill_(0, outlying, 30) * magnitudes).bfloat16(),
        grad=(inputs.grad * torch.randn(shape.rows, 1, device=DEVICE).mul(2).exp()).bfloat16(),
        gate_up=gate_up,
        largest=fp8.largest_elements(gate_up, inputs.down),
        ends=counts.cumsum(0).int(),
    )


def measure_numerics() -> list[dict]:
    """Relative errors of results and gradients against fp64, and those of the published recipe summed in fp64."""
    rows = []
    for kind in ("gaussian", "outliers"):
        inputs = judged_inputs(kind)
        operands = (inputs.rows, inputs.gate_up, inputs.down, inputs.grad, inputs.ends)
        exact = Exact(dtype=torch.float64, quantises=False).mlp(*operands)
        found = {"recipe": Exact(dtype=torch.float64, quantises=True).mlp(*operands), "bf16": bf16_mlp(inputs)}
        weights = inputs.fp8_weights()
        for form, settings in {
            "fp8": fp8.Settings(),
            "fp8, promoted": fp8.Settings(imprecise=dict.fromkeys(KERNELS, 128)),
            variant("bf16", False): fp8.Settings(weight_gradients="bf16"),
        }.items():
            groups = inputs.groups
            x = fp8.Rows(scaled=quantise.quantise_rows(inputs.rows), wide=inputs.rows)
            out, saved = fp8.forward(x, weights, groups, settings)
            grad = fp8.Rows(scaled=quantise.quantise_rows(inputs.grad), wide=inputs.grad)
            found[form] = fp8.backward(grad, saved, weights, groups, None, settings) | {"out": out}
        for form, results in found.items():
            errors = {name: relative_error(results[name], exact[name]) for name in exact}
            rows.append({"scope": "error", "data": kind, "form": form} | errors)
        rows += _sum_errors(inputs, kind, weights)
    return rows


def bf16_mlp(inputs: Inputs) -> dict[str, torch.Tensor]:
    leaves = tuple(t.detach().requires_grad_() for t in (inputs.rows, inputs.gate_up, inputs.down))
    out = expert_mlp(*leaves, inputs.ends, backend="triton")
    grads = torch.autograd.grad(out, leaves, inputs.grad)
    return dict(zip(("out", "grad_rows", "grad_gate_up", "grad_down"), (out, *grads), strict=True))


def _sum_errors(inputs: Inputs, kind: str, weights: fp8.Weights) -> Iterable[dict]:
    """The error of ``up`` from adding alone: against fp64 products of the very numbers the kernel takes."""
    x = quantise.quantise_rows(inputs.rows)
    plain = Exact(dtype=torch.float64, quantises=False)
    weight = weights.gate_up.data.double() * weights.gate_up.scales.double()[:, None, None]
    exact = plain.multiply_rows(x.data.double() * x.scales.double()[:, None], weight, inputs.ends)
    blocks, block_weight = block_quantise(inputs.rows), block_quantise(inputs.gate_up, rows=128)
    block_exact = Exact(dtype=torch.float64, quantises=True).multiply_rows(inputs.rows, inputs.gate_up, inputs.ends)
    blocks = Scaled(data=blocks.data, scales=blocks.scales.T.contiguous())
    n = inputs.gate_up.shape[1]
    for form, reference, a, b, options in (
        ("row", exact, x, weights.gate_up, {}),
        ("row, promoted", exact, x, weights.gate_up, {"imprecise": 128}),
        ("block", block_exact, blocks, block_weight, {"scaling": "block", "launch": BLOCKS["128x128, two"]}),
    ):
        error = relative_error(multiply_rows(a, b, inputs.groups, n, **options), reference)
        yield {"scope": "error of the sum", "data": kind, "form": form, "up": error}


def measure(sections: set[str]) -> Iterable[dict]:
    """Yield the rows of the result as they are measured."""
    if "numerics" in sections:
        yield from measure_numerics()
    for shape in LITE_SHAPES:
        inputs = Inputs.random(shape)
        weights = inputs.fp8_weights()
        large = shape.num_experts == 64 and shape.tokens >= 8192
        timed, launches = measure_products(inputs, weights, forms=large and "products" in sections)
        yield from timed
        if "mlp" in sections:
            yield from measure_contenders(mlp_contenders(inputs, weights, launches), shape, "mlp")
        if large and "layer" in sections:
            contenders = layer_contenders(inputs, weights, launches)
            yield layer_differences(contenders[0], contenders[2], shape)
            yield from measure_contenders(contenders, shape, "layer")
        if large and "parts" in sections:
            yield from measure_parts(inputs)
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="numerics,products,mlp,layer,parts")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # The launches of bf16 were tuned on an H200; an H100 has no table of its own.
    tables = load_tables()
    tables.setdefault(torch.cuda.get_device_name(), tables["NVIDIA H200"])
    rows = []
    for row in measure(set(arguments.sections.split(","))):
        print(
            " ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()), flush=True
        )
        rows.append(row)
    if arguments.output:
        write_result(arguments.output, describe_measurement() | {"rows": rows})


if __name__ == "__main__":
    main()
