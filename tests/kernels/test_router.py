"""The router against its published definition, written out per token, and the kernel against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import DEVICE, assert_accurate, outputs_and_gradients, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.kernels.backends import KernelInputError
from moescale.kernels.router import Routing, route, router_logits
from synchronisation import synchronisation_refused

GREEDY = {"top_k": 3, "group_limited": False, "normalize_topk": False, "routed_scaling_factor": 2.5}
GROUPED = GREEDY | {"group_limited": True, "num_groups": 4, "top_k_groups": 2}
SETTINGS = [
    GREEDY | {"num_sequences": None},
    GREEDY | {"num_sequences": 3},
    GREEDY | {"num_sequences": 1, "normalize_topk": True},
    GREEDY | {"num_sequences": 3, "normalize_topk": True, "top_k": 1},
    GROUPED | {"num_sequences": 3},
    GROUPED | {"num_sequences": None, "normalize_topk": True},
]
# Biases that overturn choices of the scores, and a mask of tokens that leaves some of each sequence out.
BIAS = torch.linspace(-0.6, 0.6, 12, device=DEVICE)[torch.tensor([5, 0, 9, 3, 11, 1, 7, 4, 10, 2, 8, 6])]
COUNTED = torch.arange(21, device=DEVICE) % 3 != 1
BIASED = [
    GREEDY | {"num_sequences": None, "bias": BIAS},
    GREEDY | {"num_sequences": 3, "bias": BIAS, "counted": COUNTED, "normalize_topk": True},
    GREEDY | {"num_sequences": 3, "bias": BIAS, "normalize_topk": True, "top_k": 1},
    GROUPED | {"num_sequences": 3, "bias": BIAS, "counted": COUNTED},
    GROUPED | {"num_sequences": 1, "bias": BIAS * 3, "normalize_topk": True},
    GROUPED | {"num_sequences": 3, "bias": BIAS, "num_groups": 12, "top_k_groups": 4},
]
SETTINGS += BIASED
# Padding in a sequence of seven: at its end, at its start, and nothing but padding in the last one.
PADDING = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], device=DEVICE) > 0
PADDED = [
    GREEDY | {"num_sequences": None, "padding": PADDING},
    GREEDY | {"num_sequences": 3, "padding": PADDING, "normalize_topk": True},
    GROUPED | {"num_sequences": 3, "padding": PADDING, "counted": COUNTED},
    BIASED[0] | {"padding": PADDING},
    BIASED[1] | {"padding": PADDING},
    BIASED[5] | {"padding": PADDING},
]
SETTINGS += PADDED


def by_definition(logits: torch.Tensor, settings: dict) -> tuple[list[list[int]], list[list[float]], float]:
    """DeepSeek-V2's router, with a bias DeepSeek-V3's, in Python numbers: chosen experts, weights, auxiliary loss."""
    num_experts, top_k = logits.shape[1], settings["top_k"]
    ids, weights = [], []
    bias = settings.get("bias")
    if bias is None:
        scores = probabilities = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits.tolist()]
    else:
        scores = [[1 / (1 + math.exp(-x)) for x in row] for row in logits.tolist()]
        probabilities = [[s / sum(row) for s in row] for row in scores]
    balanced = []
    for s in scores:
        candidates = s if bias is None else [x + b for x, b in zip(s, bias.tolist(), strict=True)]
        allowed = list(range(num_experts))
        if settings["group_limited"]:
            size = num_experts // settings["num_groups"]
            within = [
                sorted(candidates[g * size : (g + 1) * size], reverse=True) for g in range(settings["num_groups"])
            ]
            groups = sorted(range(settings["num_groups"]), key=lambda g: -sum(within[g][: 1 if bias is None else 2]))
            allowed = [e for e in allowed if e // size in groups[: settings["top_k_groups"]]]
        best = sorted(allowed, key=lambda e: -candidates[e])[:top_k]
        total = sum(s[e] for e in best)
        factor = settings["routed_scaling_factor"]
        if bias is None:
            factor = 1 / total if settings["normalize_topk"] and top_k > 1 else factor
        elif settings["normalize_topk"]:
            factor = factor / total
        ids.append(best)
        weights.append([s[e] * factor for e in best])
        balanced.append(best if bias is None else sorted(range(num_experts), key=lambda e: -s[e])[:top_k])
    sequences = settings["num_sequences"] or 1
    is_padding = settings.get("padding", torch.zeros(len(ids))).tolist()
    length = len(ids) // sequences
    loss = 0.0
    for start in range(0, len(ids), length):
        text = [t for t in range(start, start + length) if not is_padding[t]]
        for e in range(num_experts) if text else ():
            count = sum(balanced[t].count(e) for t in text)
            mean = sum(probabilities[t][e] for t in text) / len(text)
            loss += count / (len(text) * top_k / num_experts) * mean / sequences
    return ids, weights, loss


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_choice_weights_counts_and_loss_are_the_published_definition(settings: dict, backend: str) -> None:
    logits = randn(21, 12)
    ids, weights, loss = by_definition(logits, settings)
    routing = route(logits, **settings, backend=backend)
    assert routing.topk_ids.tolist() == ids and routing.topk_ids.dtype == torch.int32
    torch.testing.assert_close(routing.topk_weights.detach().cpu(), torch.tensor(weights))
    torch.testing.assert_close(routing.aux_loss.item(), loss, rtol=1e-5, atol=0)
    assert routing.tokens_per_expert.tolist() == [sum(row.count(e) for row in ids) for e in range(12)]
    counted = settings.get("counted", torch.ones(21, dtype=torch.bool, device=DEVICE))
    counted = counted & ~settings.get("padding", torch.zeros_like(counted))
    counted_ids = [row for row, counts in zip(ids, counted.tolist(), strict=True) if counts]
    assert routing.load.tolist() == [sum(row.count(e) for row in counted_ids) for e in range(12)]


def test_a_bias_changes_choices_and_their_weights_stay_the_scores() -> None:
    logits = randn(21, 12)
    plain, biased = (route(logits, **BIASED[0] | {"bias": bias}) for bias in (torch.zeros_like(BIAS), BIAS))
    assert not torch.equal(plain.topk_ids.sort().values, biased.topk_ids.sort().values)
    chosen = logits.sigmoid().gather(1, biased.topk_ids.long())
    torch.testing.assert_close(biased.topk_weights, chosen * GREEDY["routed_scaling_factor"])
    torch.testing.assert_close(plain.aux_loss, biased.aux_loss)  # which is of the scores alone


def test_load_leaves_out_tokens_that_do_not_count_with_softmax_too() -> None:
    logits = randn(21, 12)
    for backend in ("torch", "triton"):
        routing = route(logits, **SETTINGS[1], counted=COUNTED, backend=backend)
        left = torch.bincount(routing.topk_ids[COUNTED].flatten(), minlength=12)
        assert torch.equal(routing.load.long(), left) and routing.tokens_per_expert.sum() == 63


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_of_weights_and_loss_agree(settings: dict) -> None:
    def differentiable(logits: torch.Tensor, *, backend: str) -> tuple[torch.Tensor, ...]:
        routing = route(logits, **settings, backend=backend)
        return routing.topk_weights, routing.aux_loss

    assert_accurate(differentiable, [randn(21, 12)])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["softmax", "sigmoid"])
def test_padding_has_no_part_in_loss_load_and_gradients(bias: torch.Tensor | None, backend: str) -> None:
    """Sequences cut to their text give the same, and what logits padding has changes nothing."""

    def run(logits: torch.Tensor, **changes: object) -> tuple[Routing, torch.Tensor]:
        routing = route(logits, **GREEDY | {"bias": bias, "backend": backend} | changes)
        return routing, torch.autograd.grad(routing.aux_loss, logits)[0]

    logits = randn(14, 12)
    padding = PADDING[:14]
    whole, gradient = run(logits, num_sequences=2, padding=padding)
    assert not gradient[padding].any() and gradient[~padding].any()
    parts = [run(logits[part][~padding[part]], num_sequences=1) for part in (slice(0, 7), slice(7, 14))]
    torch.testing.assert_close(whole.aux_loss, (parts[0][0].aux_loss + parts[1][0].aux_loss) / 2)
    torch.testing.assert_close(gradient[~padding], torch.cat([part[1] for part in parts]) / 2)
    assert torch.equal(whole.load, parts[0][0].load + parts[1][0].load)
    spoilt = logits.detach().masked_fill(padding[:, None], 3.0).requires_grad_()
    other, other_gradient = run(spoilt, num_sequences=2, padding=padding)
    assert torch.equal(other.aux_loss, whole.aux_loss) and torch.equal(other.load, whole.load)
    assert torch.equal(other_gradient, gradient)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["softmax", "sigmoid"])
def test_a_mask_of_no_padding_changes_nothing(bias: torch.Tensor | None, backend: str) -> None:
    arguments = GREEDY | {"num_sequences": 3, "bias": bias, "backend": backend}
    plain = route(randn(21, 12), **arguments)
    for a, b in zip(route(randn(21, 12), **arguments, padding=torch.zeros_like(PADDING)), plain, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 70),
    num_experts=st.sampled_from([1, 2, 5, 64, 160, 256]),
    top_k=st.integers(1, 8),
    normalize=st.booleans(),
    biased=st.booleans(),
    padded=st.booleans(),
)
def test_kernel_agrees_on_any_shape(
    tokens: int, num_experts: int, top_k: int, normalize: bool, biased: bool, padded: bool
) -> None:
    logits = randn(tokens, num_experts, seed=tokens)
    arguments = GREEDY | {"top_k": min(top_k, num_experts), "normalize_topk": normalize, "num_sequences": None}
    if biased:
        arguments["bias"] = randn(num_experts, seed=1, grad=False)
        arguments["counted"] = randn(tokens, seed=2, grad=False) > 0
    if padded:
        arguments["padding"] = randn(tokens, seed=3, grad=False) > 0.5
    ours, plain = (route(logits, **arguments, backend=b) for b in ("triton", "torch"))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_equal_probabilities_choose_the_first_experts() -> None:
    routing = route(torch.zeros(5, 8, device=DEVICE), **GREEDY, num_sequences=None, backend="triton")
    assert routing.topk_ids.tolist() == [[0, 1, 2]] * 5


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_ids_stay_in_range_for_logits_that_are_not_finite() -> None:
    for bad in (float("nan"), float("-inf"), float("inf")):
        logits = torch.full((3, 5), bad, device=DEVICE)
        for bias in (None, torch.zeros(5, device=DEVICE)):
            ids = route(logits, **GREEDY, num_sequences=None, bias=bias, backend="triton").topk_ids
            assert ((ids >= 0) & (ids < 5)).all()


def test_scores_of_extreme_logits_are_exact() -> None:
    logits = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0]], device=DEVICE)
    arguments = GREEDY | {"top_k": 5, "routed_scaling_factor": 1.0, "num_sequences": None}
    weights = route(logits, **arguments, bias=torch.zeros(5, device=DEVICE), backend="triton").topk_weights
    torch.testing.assert_close(weights.sort().values, logits.sigmoid())


def test_balanced_routing_has_a_loss_of_one() -> None:
    logits = torch.eye(8, device=DEVICE).repeat(4, 1) * 20
    arguments = GREEDY | {"top_k": 1, "num_sequences": None}
    torch.testing.assert_close(route(logits, **arguments).aux_loss.item(), 1.0, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 13}, r"top_k \(13\) must be between 1 and the 12 reachable"),
        ({"group_limited": True, "num_groups": 5}, r"num_groups \(5\).*must divide"),
        ({"num_sequences": 4}, r"num_sequences \(4\) must divide the 21 tokens"),
        ({"bias": torch.zeros(11)}, r"bias.*\[E\]"),
        ({"bias": torch.zeros(12, dtype=torch.bfloat16)}, r"bias.*float32"),
        ({"counted": torch.ones(21)}, r"counted.*bool"),
        ({"padding": torch.ones(21)}, r"padding.*bool"),
        ({"padding": torch.ones(20, dtype=torch.bool)}, r"padding.*\[T\]"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        route(randn(21, 12), **(GREEDY | {"num_sequences": None} | changes))


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["softmax", "sigmoid"])
def test_the_operator_compiles_without_a_graph_break(bias: torch.Tensor | None, padding: torch.Tensor | None) -> None:
    def balanced(logits: torch.Tensor) -> Routing:
        return route(logits * 2, **GREEDY, num_sequences=3, bias=bias, padding=padding, backend="triton")

    logits = randn(21, 12)
    compiled = torch.compile(balanced, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(logits), balanced(logits), strict=True):
        torch.testing.assert_close(a, b)


def test_logits_of_bf16_inputs_are_exact_to_fp32() -> None:
    x, weight = randn(40, 64, dtype=torch.bfloat16), randn(8, 64, dtype=torch.bfloat16, seed=1)
    logits = router_logits(x, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_logit_gradients_of_bf16_inputs_match_fp32_products() -> None:
    x, weight = randn(4096, 2048, dtype=torch.bfloat16), randn(64, 2048, dtype=torch.bfloat16, seed=1)
    direction = randn(4096, 64, seed=2, grad=False)
    ours = torch.autograd.grad((router_logits(x, weight) * direction).sum(), (x, weight))
    exact = direction @ weight.float(), direction.T @ x.float()
    for a, b in zip(ours, exact, strict=True):
        # One rounding to bf16 and nothing else: 2^-9 at most, about 0.0017 in the norm.
        assert (a.float() - b).norm() < 0.002 * b.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS)
def test_large_inputs_agree_repeat_exactly_and_never_synchronise(settings: dict) -> None:
    if "bias" in settings:
        settings = settings | {"bias": randn(64, seed=3, grad=False) * 0.1, "num_groups": 4, "top_k_groups": 2}
        settings["counted"] = COUNTED
    if "counted" in settings:
        settings = settings | {"counted": randn(8193, seed=4, grad=False) > 0}
    if "padding" in settings:
        settings = settings | {"padding": randn(8193, seed=5, grad=False) > 0.5}

    def differentiable(logits: torch.Tensor, *, backend: str) -> tuple[torch.Tensor, ...]:
        routing = route(logits, **settings, backend=backend)
        return routing.topk_weights, routing.aux_loss

    logits = randn(8193, 64)
    assert_accurate(differentiable, [logits])
    direction = randn(8193, settings["top_k"], seed=1, grad=False)

    def once() -> list[torch.Tensor]:
        routing = route(logits, **settings, backend="triton")
        loss = (routing.topk_weights * direction).sum() + routing.aux_loss
        return [*routing, *torch.autograd.grad(loss, logits)]

    with synchronisation_refused():
        runs = [once() for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_the_comparison_can_fail() -> None:
    def biased(logits: torch.Tensor, *, backend: str) -> tuple[torch.Tensor, ...]:
        return (logits * (1.001 if backend == "triton" else 1.0),)

    with pytest.raises(AssertionError, match="result 0: error"):
        assert_accurate(biased, [randn(4, 4)])
    assert len(outputs_and_gradients(biased, [randn(4, 4)], "torch")) == 2
