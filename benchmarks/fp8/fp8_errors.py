"""Errors of the package's GEMMs in fp8 against fp64, next to those of a published recipe and of bf16.

The recipe (``fp8_recipe``) quantises as DeepSeek-V3 does and sums in fp64. ``over_recipe``: the error over its error;
``over_power_of_two``: over the error of the same with scales that are powers of two, as DeepSeek-V3.1 has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fp8_recipe import Exact, relative_error
from moescale.kernels.experts import experts
from moescale.kernels.fp8 import Copies, copies_of, kernels_for
from moescale.kernels.fp8.linear import fp8_linear
from moescale.kernels.fp8.routed import fp8_experts
from moescale.kernels.fp8.scaled import Scaled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DATA = ("gaussian", "outliers")
ROUTINGS = ("even", "skewed", "one empty, one with one row")
EXACT, RECIPE = (Exact(dtype=torch.float64, quantises=quantises) for quantises in (False, True))
POWER_OF_TWO = Exact(dtype=torch.float64, quantises=True, power_of_two=True)
FORMS = (EXACT, RECIPE, POWER_OF_TWO)
Results = dict[str, torch.Tensor]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def drawn_rows(data: str, num_rows: int, width: int, spread: float = 1) -> torch.Tensor:
    """Return rows [R, C] of unit variance; with outliers, rows of all magnitudes, and every 256th channel 30 times."""
    rows = randn(num_rows, width)
    if data == "gaussian":
        return rows
    channels = torch.ones(width, device=DEVICE)
    channels[::256] = 30
    return (rows * channels * (torch.randn(num_rows, 1, device=DEVICE) * spread).exp()).bfloat16()


def drawn_weight(data: str, *shape: int) -> torch.Tensor:
    """Return a weight of standard deviation 0.02; with outliers, its columns differ in size."""
    weight = randn(*shape) * 0.02
    if data == "gaussian":
        return weight
    return (weight * torch.randn(shape[-1], device=DEVICE).mul(0.5).exp()).bfloat16()


def drawn_ids(routing: str, tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    """Return topk_ids [T, K] int32."""
    scores = torch.rand(tokens, num_experts, device=DEVICE).log()
    if routing == "skewed":
        scores *= torch.arange(1, num_experts + 1, device=DEVICE) ** 1.5
    if routing == "one empty, one with one row":
        scores[:, -1] = -torch.inf
        scores[:, -2] = -torch.inf
        scores[0, -2] = 0
    return scores.topk(top_k).indices.int()


def judged(form: dict[str, Any], found: Results, exact: Results, *recipes: Results) -> Iterator[dict[str, Any]]:
    """Yield the rows of the result: of each result the error, the recipes', and what it is over each."""
    for name, value in exact.items():
        error, *of_recipes = (relative_error(results[name], value) for results in (found, *recipes))
        row = form | {"result": name, "error": error, "recipe": of_recipes[0], "power_of_two": of_recipes[1]}
        yield row | {"over_recipe": error / of_recipes[0], "over_power_of_two": error / of_recipes[1]}


def product_errors(data: str, tokens: int, num_experts: int, hidden: int, ffn: int) -> Iterator[dict[str, Any]]:
    """The six products of an expert MLP, each from operands that were drawn."""
    kernels = kernels_for(torch.empty(0, device=DEVICE))
    ends = (torch.arange(1, num_experts + 1) * tokens // num_experts).int().to(DEVICE)
    groups, padded = kernels.group_rows(ends, tokens), kernels.pad_ends(ends)
    x, act, pre, grad = (drawn_rows(data, tokens, width) for width in (hidden, ffn, 2 * ffn, hidden))
    gate_up, down = (drawn_weight(data, num_experts, *shape) for shape in ((2 * ffn, hidden), (hidden, ffn)))
    copies = {id(weight): copies_of(weight) for weight in (gate_up, down)}

    def rows(a: torch.Tensor, weight: torch.Tensor, transposed: bool) -> tuple[Callable, Callable]:
        own = copies[id(weight)]
        stored = Scaled(own.columns if transposed else own.rows, own.scales)
        plain = weight.mT if transposed else weight
        scaled = kernels.quantize_rows(a)
        return (
            lambda: kernels.multiply_rows(scaled, stored, groups, plain.shape[1], transposed=transposed),
            lambda form: form.multiply_rows(a, plain, ends),
        )

    def weights(a: torch.Tensor, b: torch.Tensor) -> tuple[Callable, Callable]:
        left, right = (kernels.transpose_rows(kernels.quantize_rows(t), groups, padded) for t in (a, b))
        return lambda: kernels.weight_gradient(left, right, padded), lambda form: form.weight_gradient(a, b, ends)

    products = {
        "up": rows(x, gate_up, False),
        "down": rows(act, down, False),
        "down_dgrad": rows(grad, down, True),
        "up_dgrad": rows(pre, gate_up, True),
        "up_wgrad": weights(pre, x),
        "down_wgrad": weights(grad, act),
    }
    for name, (ours, of) in products.items():
        form = {"scope": "error of a product", "data": data}
        yield from judged(form, {name: ours()}, *({name: of(each)} for each in FORMS))


def layer_errors(
    data: str, routing: str, tokens: int, num_experts: int, top_k: int, hidden: int, ffn: int
) -> Iterator[dict[str, Any]]:
    """Routed experts from tokens to tokens, and all their gradients."""
    ids = drawn_ids(routing, tokens, num_experts, top_k)
    weights = torch.rand(ids.shape, device=DEVICE).softmax(1)
    x, grad = drawn_rows(data, tokens, hidden), drawn_rows(data, tokens, hidden, 2)
    gate_up, down = (drawn_weight(data, num_experts, *shape) for shape in ((2 * ffn, hidden), (hidden, ffn)))
    plain = (x, ids, weights, gate_up, down)
    leaves = [t.detach().requires_grad_() for t in (x, weights, gate_up, down)]

    def differentiated(layer: Callable[..., torch.Tensor], *copies: Copies) -> Results:
        out = layer(leaves[0], ids, *leaves[1:], *copies)
        names = ("grad_x", "grad_topk_weights", "grad_gate_up", "grad_down")
        gradients = torch.autograd.grad(out, leaves, grad)
        return {"out": out.detach()} | dict(zip(names, gradients, strict=True))

    judges = [form.experts(*plain, grad) for form in FORMS]
    found = {"fp8": differentiated(fp8_experts, copies_of(gate_up), copies_of(down)), "bf16": differentiated(experts)}
    for name, results in found.items():
        form = {"scope": "error of a layer", "data": data, "routing": routing, "form": name}
        yield from judged(form, results, *judges)


def linear_errors(data: str, tokens: int, width: int, inputs: int) -> Iterator[dict[str, Any]]:
    """A linear layer and its gradients; that of the weight is in bf16 where the rest is in fp8."""
    x, grad = drawn_rows(data, tokens, inputs), drawn_rows(data, tokens, width, 2)
    weight = drawn_weight(data, width, inputs)
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    judges = [form.linear(x, weight, grad) for form in FORMS]
    copies = copies_of(weight)
    for name, out in (("fp8", fp8_linear(*leaves, copies)), ("bf16", F.linear(*leaves))):
        gradients = dict(zip(("grad_x", "grad_weight"), torch.autograd.grad(out, leaves, grad), strict=True))
        form = {"scope": "error of a linear layer", "data": data, "form": name}
        yield from judged(form, {"out": out.detach()} | gradients, *judges)


def measure_errors(
    tokens: int = 1024, num_experts: int = 8, top_k: int = 6, hidden: int = 2048, ffn: int = 1408
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the result; by default at the widths of DeepSeek-Coder-V2-Lite."""
    for data in DATA:
        yield from product_errors(data, tokens * top_k, num_experts, hidden, ffn)
        for routing in ROUTINGS if data == "gaussian" else ROUTINGS[:2]:
            yield from layer_errors(data, routing, tokens, num_experts, top_k, hidden, ffn)
        yield from linear_errors(data, tokens, 2 * ffn, hidden)
