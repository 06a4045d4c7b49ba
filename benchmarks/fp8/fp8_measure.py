"""Times the package's GEMMs in fp8 against bf16 on one Hopper GPU, and judges their errors.

    python benchmarks/fp8/fp8_measure.py --output fp8_gemms.json
        [--sections numerics products passes mlp layer dense copies]

Random data. ``numerics``: errors against fp64 (``fp8_errors``), also without a GPU, of the definitions. ``products``:
the six products of an expert MLP, alone. ``passes``: what is between them, also where rows lie in a buffer of two and
eight times as many, as on ranks that share experts. ``mlp``: expert MLP on sorted rows at the six shapes of the
reference, with all that fp8 adds: rows and gradients are quantised, and four tensors transposed. ``layer``: routed
experts from tokens to tokens, sort, gather and sum included. ``dense``: the linear layers of DeepSeek-Coder-V2-Lite.
Gradients of weights are added to a buffer where ``buffer`` says so. bf16 is Triton and, where another backend is faster
here, that one. ``copies``: writing the fp8 copies of weights, once an update, is in no other time. Times are medians of
rounds in which all take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fp8_errors import DEVICE, measure_errors, randn
from moescale.kernels.backends import choose_experts_backend
from moescale.kernels.experts import expert_mlp, experts
from moescale.kernels.experts import triton as bf16
from moescale.kernels.experts.launch_config import load_tables
from moescale.kernels.experts.sort import sort_pairs
from moescale.kernels.fp8 import Copies, copies_of, write_copies
from moescale.kernels.fp8 import triton as fp8
from moescale.kernels.fp8.linear import fp8_linear
from moescale.kernels.fp8.routed import fp8_experts
from moescale.kernels.fp8.rows import fp8_expert_mlp
from moescale.kernels.fp8.scaled import Scaled
from moescale.kernels.linear import linear
from moescale.tools.bench_experts import LAYER_SHAPES, Contender, choose_experts, forward_backward_flops
from moescale.tools.measurement import describe_measurement, write_result
from moescale.tools.tune_experts import LITE_SHAPES, ExpertShape, measure_ms

SECTIONS = ("numerics", "products", "passes", "mlp", "layer", "dense", "copies")
SLEEP_CYCLES = 12_000_000
"""About 6 ms: longer than the host needs to queue a forward or backward."""
ROUNDS = 5
DENSE_TOKENS = 8192
DENSE_SHAPES = {
    "q": (3072, 2048),
    "kv_a": (576, 2048),
    "kv_b": (4096, 512),
    "output": (2048, 2048),
    "gate_up": (5632, 2048),
    "down": (2048, 2816),
}
"""Rows and columns of the weights outside the routed experts; the last two are those of the shared experts."""
BUFFERS = {"none": None, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Random operands of routed experts at one shape, and the fp8 copies of their weights."""

    shape: ExpertShape
    gate_up: torch.Tensor
    down: torch.Tensor
    copies: tuple[Copies, Copies]
    ids: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def random(cls, shape: ExpertShape) -> Inputs:
        """Draw weights of standard deviation 0.02; every expert is as likely."""
        hidden, ffn, num_experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
        gate_up, down = randn(num_experts, 2 * ffn, hidden) * 0.02, randn(num_experts, hidden, ffn) * 0.02
        ids = choose_experts(shape, "uniform")
        return cls(
            shape=shape,
            gate_up=gate_up.requires_grad_(),
            down=down.requires_grad_(),
            copies=(copies_of(gate_up), copies_of(down)),
            ids=ids,
            ends=sort_pairs(ids, num_experts)[2],
        )

    def stored(self, weight: str, *, transposed: bool = False) -> Scaled:
        """Return the copy of ``gate_up`` or ``down`` that a product of rows reads."""
        copies = self.copies[weight == "down"]
        return Scaled(copies.columns if transposed else copies.rows, copies.scales)


def product_flops(shape: ExpertShape, product: str) -> float:
    """FLOPs of one of the six products: those of ``up`` are of 2F columns."""
    return 2.0 * shape.rows * shape.hidden_size * shape.intermediate_size * (2 if product.startswith("up") else 1)


def fp8_products(inputs: Inputs) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the six products by name, of operands that are quantised already."""
    shape, groups = inputs.shape, fp8.group_rows(inputs.ends, inputs.shape.rows)
    hidden, ffn, padded = shape.hidden_size, shape.intermediate_size, fp8.pad_ends(inputs.ends)
    x, act, pre = (fp8.quantize_rows(randn(shape.rows, width)) for width in (hidden, ffn, 2 * ffn))
    x_t, act_t, pre_t = (fp8.transpose_rows(t, groups, padded) for t in (x, act, pre))

    def rows(a: Scaled, weight: str, n: int, *, transposed: bool = False) -> Callable[[], torch.Tensor]:
        stored = inputs.stored(weight, transposed=transposed)
        return functools.partial(fp8.multiply_rows, a, stored, groups, n, transposed=transposed)

    return {
        "up": rows(x, "gate_up", 2 * ffn),
        "down": rows(act, "down", hidden),
        "down_dgrad": rows(x, "down", ffn, transposed=True),
        "up_dgrad": rows(pre, "gate_up", hidden, transposed=True),
        "up_wgrad": functools.partial(fp8.weight_gradient, pre_t, x_t, padded),
        "down_wgrad": functools.partial(fp8.weight_gradient, x_t, act_t, padded),
    }


def bf16_products(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """The same in bf16, as the Triton backend calls them; ``up`` has SwiGLU in it."""
    shape, groups = inputs.shape, bf16.group_rows(inputs.ends, inputs.shape.rows)
    gate_up, down = inputs.gate_up.detach(), inputs.down.detach()
    x, act, pre = (randn(shape.rows, width) for width in (shape.hidden_size, *(down.shape[2], gate_up.shape[1])))
    return {
        "up": lambda: bf16.multiply_up(x, gate_up, groups, write_pre=True, write_act=True)[0],
        "down": lambda: bf16.multiply_rows(act, down, groups),
        "down_dgrad": lambda: bf16.multiply_rows(x, down, groups, transposed=True, kernel="down_dgrad"),
        "up_dgrad": lambda: bf16.multiply_rows(pre, gate_up, groups, transposed=True, kernel="up_dgrad"),
        "up_wgrad": lambda: bf16.weight_gradient(pre, x, groups, kernel="up_wgrad"),
        "down_wgrad": lambda: bf16.weight_gradient(x, act, groups, kernel="down_wgrad"),
    }


def measure_products(shapes: Iterable[ExpertShape]) -> Iterator[dict[str, Any]]:
    """Time each product of each shape."""
    for shape in shapes:
        inputs = Inputs.random(shape)
        calls = {(name, "fp8"): call for name, call in fp8_products(inputs).items()}
        calls |= {(name, "bf16 triton"): call for name, call in bf16_products(inputs).items()}
        times = time_rounds(calls)
        for (name, form), ms in times.items():
            tflops = product_flops(shape, name) / ms / 1e9
            row = describe(shape, "product", form) | {"product": name, "ms": ms, "tflops": tflops}
            yield row | {"speedup": times[name, "bf16 triton"] / ms}


def measure_passes(shape: ExpertShape) -> Iterator[dict[str, Any]]:
    """Time the passes with a program for each of ``buffer_rows``, and with programs that walk the rows in use."""
    ends, used, ffn = Inputs.random(shape).ends, shape.rows, shape.intermediate_size
    for times in (1, 2, 8):
        number = times * used
        pre, grad = randn(number, 2 * ffn), randn(number, ffn)
        weights = torch.rand(number, device=DEVICE)
        quantised = fp8.quantize_rows(pre)
        for programs, expected in {"every row": number, "walking": used}.items():
            groups, padded = fp8.group_rows(ends, number, expected), fp8.pad_ends(ends)
            calls: dict[str, tuple[Callable[[], object], int]] = {
                "swiglu": (functools.partial(fp8.swiglu, pre, groups), 5),
                "swiglu_backward": (functools.partial(fp8.swiglu_backward, grad, pre, weights, groups), 9),
                "transpose": (functools.partial(fp8.transpose_rows, quantised, groups, padded), 4),
            }
            took = time_rounds({name: call for name, (call, _) in calls.items()})
            for name, (_, num_bytes) in calls.items() if times > 1 or programs == "every row" else ():
                row = {"scope": "pass", "pass": name, "rows": used, "buffer_rows": number, "programs": programs}
                rate = num_bytes * used * ffn / took[name] / 1e6
                yield row | {"ms": took[name], "gigabytes_per_second": rate}


def time_rounds(calls: dict[Any, Callable[[], object]]) -> dict[Any, float]:
    """Return the median milliseconds of each call, of rounds in which they take turns."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, call in calls.items():
            times[key].append(measure_ms(call, runs=3, sleep_cycles=SLEEP_CYCLES // 4))
    return {key: statistics.median(values) for key, values in times.items()}


def describe(shape: ExpertShape, scope: str, form: str) -> dict[str, Any]:
    return {"scope": scope, "tokens": shape.tokens, "num_experts": shape.num_experts, "form": form}


def contender(name: str, forward: Callable[[], Any], leaves: tuple[torch.Tensor, ...], grad: torch.Tensor) -> Contender:
    """Return one whose backward is autograd's; of a weight with a buffer it returns None."""
    backward = functools.partial(torch.autograd.grad, inputs=leaves, grad_outputs=grad, allow_unused=True)
    return Contender(backend=name, forward=forward, backward=lambda out, retain: backward(out, retain_graph=retain))


def bf16_backends() -> list[str]:
    """Triton, and what ``auto`` takes here, if it is another."""
    return list(dict.fromkeys(("triton", choose_experts_backend(torch.device(DEVICE), torch.bfloat16))))


def mlp_contenders(inputs: Inputs) -> list[Contender]:
    """The MLP on sorted rows."""
    shape, gate_up, down = inputs.shape, inputs.gate_up, inputs.down
    x, grad = randn(shape.rows, shape.hidden_size).requires_grad_(), randn(shape.rows, shape.hidden_size)
    leaves, (of_gate_up, of_down) = (x, gate_up, down), inputs.copies
    call = functools.partial(fp8_expert_mlp, *leaves, inputs.ends, gate_up_copies=of_gate_up, down_copies=of_down)
    forms: dict[str, Callable[[], torch.Tensor]] = {"fp8": call}
    forms |= {
        f"bf16 {name}": functools.partial(expert_mlp, *leaves, inputs.ends, backend=name) for name in bf16_backends()
    }
    return [contender(name, forward, leaves, grad) for name, forward in forms.items()]


def layer_contenders(inputs: Inputs, buffer: torch.dtype | None) -> list[Contender]:
    """Routed experts, as a model calls them."""
    shape, gate_up, down = inputs.shape, inputs.gate_up, inputs.down
    x, grad = randn(shape.tokens, shape.hidden_size).requires_grad_(), randn(shape.tokens, shape.hidden_size)
    weights = torch.rand(inputs.ids.shape, device=DEVICE).softmax(1).requires_grad_()
    call, leaves = (x, inputs.ids, weights, gate_up, down), (x, weights, gate_up, down)
    buffers = (
        {}
        if buffer is None
        else {
            "gate_up_gradient": torch.zeros_like(gate_up, dtype=buffer, requires_grad=False),
            "down_gradient": torch.zeros_like(down, dtype=buffer, requires_grad=False),
        }
    )
    forms = {"fp8": functools.partial(fp8_experts, *call, *inputs.copies, **buffers)}
    forms |= {f"bf16 {name}": functools.partial(experts, *call, backend=name, **buffers) for name in bf16_backends()}
    return [contender(name, forward, leaves, grad) for name, forward in forms.items()]


def dense_contenders(width: int, inputs: int, buffer: torch.dtype | None) -> list[Contender]:
    """One linear layer."""
    weight = (randn(width, inputs) * 0.02).requires_grad_()
    x, grad, copies = randn(DENSE_TOKENS, inputs).requires_grad_(), randn(DENSE_TOKENS, width), copies_of(weight)
    own = None if buffer is None else torch.zeros_like(weight, dtype=buffer, requires_grad=False)
    forms = {
        "fp8": lambda: fp8_linear(x, weight, copies, weight_gradient=own),
        "bf16": lambda: linear(x, weight, weight_gradient=own),
    }
    return [contender(name, forward, (x, weight), grad) for name, forward in forms.items()]


def measure_contenders(contenders: list[Contender], row: dict[str, Any], flops: float) -> list[dict[str, Any]]:
    """Time forward and backward of each in turn, and return a row for each, which begins with ``row``.

    ``over_...``: the time of that form over this one's. ``peak_bytes``: allocated at most above what was there (inputs,
    weights and copies), with what the forward saves and gradients.
    """
    samples: dict[str, list[tuple[float, float]]] = {c.backend: [] for c in contenders}
    peaks = {contender.backend: peak_bytes(contender) for contender in contenders}
    for _, one in itertools.product(range(ROUNDS), contenders):
        forward_ms = measure_ms(one.forward, runs=3, sleep_cycles=SLEEP_CYCLES)
        backward = functools.partial(one.backward, one.forward(), True)
        samples[one.backend].append((forward_ms, measure_ms(backward, runs=3, sleep_cycles=SLEEP_CYCLES)))
        del backward
    medians = {
        name: [statistics.median(column) for column in zip(*times, strict=True)] for name, times in samples.items()
    }
    return [
        row
        | {"form": name, "forward_ms": forward_ms, "backward_ms": backward_ms, "ms": forward_ms + backward_ms}
        | {"tflops": flops / (forward_ms + backward_ms) / 1e9}
        | {
            f"over_{other.replace(' ', '_')}": sum(medians[other]) / (forward_ms + backward_ms)
            for other in medians
            if other != "fp8"
        }
        | {"peak_bytes": peaks[name]}
        for name, (forward_ms, backward_ms) in medians.items()
    ]


def peak_bytes(one: Contender) -> int:
    """Return what a forward and backward allocate at most; the first of two also compiles."""
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        one.backward(one.forward(), False)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_experts(sections: set[str], shapes: Iterable[ExpertShape]) -> Iterator[dict[str, Any]]:
    """Sections ``mlp`` and ``layer``."""
    for shape in shapes:
        inputs, flops = Inputs.random(shape), forward_backward_flops(shape)
        if "mlp" in sections:
            yield from measure_contenders(mlp_contenders(inputs), describe(shape, "mlp", ""), flops)
        for name in ("none", "fp32") if "layer" in sections and shape in LAYER_SHAPES else ():
            row = describe(shape, "layer", "") | {"buffer": name}
            yield from measure_contenders(layer_contenders(inputs, BUFFERS[name]), row, flops)
        torch.cuda.empty_cache()


def measure_dense() -> Iterator[dict[str, Any]]:
    """Each linear layer, and all of them."""
    for buffer in ("bf16", "fp32"):
        totals: dict[str, float] = {}
        for name, (width, inputs) in DENSE_SHAPES.items():
            row = {"scope": "dense", "layer": name, "n": width, "k": inputs, "buffer": buffer}
            rows = measure_contenders(
                dense_contenders(width, inputs, BUFFERS[buffer]), row, 6.0 * DENSE_TOKENS * width * inputs
            )
            for found in rows:
                totals[found["form"]] = totals.get(found["form"], 0.0) + found["ms"]
            yield from rows
        for form, ms in totals.items():
            row = {"scope": "dense, all six", "buffer": buffer, "form": form, "ms": ms}
            yield row | {"over_bf16": totals["bf16"] / ms}


def measure_copies() -> Iterator[dict[str, Any]]:
    """Time what follows an update: of a layer of 64 experts, of its linear layers, and of both.

    ``gigabytes_per_second``: two reads of each weight, for its largest element and its copies, and two writes.
    """
    shape = LAYER_SHAPES[0]
    sizes = [(shape.num_experts, *size) for size in ((2816, 2048), (2048, 1408))]
    groups = {"routed experts": sizes, "linear layers": list(DENSE_SHAPES.values())}
    for name, own in (groups | {"a layer": [size for part in groups.values() for size in part]}).items():
        weights = [randn(*size) for size in own]
        copies = [copies_of(weight) for weight in weights]
        pairs = list(zip(weights, copies, strict=True))
        ms = time_rounds({name: lambda pairs=pairs: [write_copies(*pair) for pair in pairs]})[name]
        gigabytes = 6e-9 * sum(weight.numel() for weight in weights)
        yield {"scope": "copies", "weights": name, "ms": ms, "gigabytes_per_second": gigabytes / ms * 1e3}


def measure(sections: set[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the result as they are measured."""
    if "numerics" in sections:
        yield from measure_errors()
    if "products" in sections:
        yield from measure_products(LAYER_SHAPES)
    if "passes" in sections:
        yield from measure_passes(LAYER_SHAPES[0])
    if sections & {"mlp", "layer"}:
        yield from measure_experts(sections, LITE_SHAPES if "mlp" in sections else LAYER_SHAPES)
    if "dense" in sections:
        yield from measure_dense()
    if "copies" in sections:
        yield from measure_copies()


def rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def print_row(row: dict[str, Any], before: dict[str, Any]) -> None:
    """Print a row of a table; with its head, where the row before was of another."""
    widths = [max(len(name), 27 if isinstance(value, str) else 10) for name, value in row.items()]
    if row.keys() != before.keys() or row["scope"] != before["scope"]:
        print("\n" + "  ".join(name.ljust(width) for name, width in zip(row, widths, strict=True)))
    print("  ".join(str(value).ljust(width) for value, width in zip(row.values(), widths, strict=True)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if torch.cuda.is_available():
        # The launches of bf16 were tuned on an H200; an H100 has no table of its own.
        tables = load_tables()
        tables.setdefault(torch.cuda.get_device_name(), tables["NVIDIA H200"])
    elif set(arguments.sections) != {"numerics"}:
        parser.error("there is no GPU; --sections numerics needs none")
    rows: list[dict[str, Any]] = []
    for row in measure(set(arguments.sections)):
        rows.append({name: rounded(value) for name, value in row.items()})
        print_row(rows[-1], rows[-2] if len(rows) > 1 else {})
    if arguments.output:
        write_result(arguments.output, describe_measurement("quack-kernels") | {"rows": rows})


if __name__ == "__main__":
    main()
