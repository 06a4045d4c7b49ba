"""Causal attention with different widths of key and value, within documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from agreement import DEVICE, randn

from moescale.kernels.attention import Documents, attention
from moescale.kernels.backends import HOPPER, KernelInputError, cute_available


def by_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    documents: Documents | None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """In fp32, or fp64 for such inputs."""
    batch, length, heads, _ = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bsnd,btnd->bnst", q.to(dtype), k.to(dtype)) * scale
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    if window is not None:
        hidden = hidden | torch.ones_like(hidden).tril(-window)
    if documents is not None:
        hidden = hidden | (documents.first[:, None, :, None] != documents.first[:, None, None, :])
    exponentials = scores.masked_fill(hidden, float("-inf")).exp()
    sums = exponentials.sum(-1, keepdim=True)
    if sinks is not None:
        sums = sums + sinks.to(dtype).exp()[:, None, None]
    return torch.einsum("bnst,btnd->bsnd", exponentials / sums, v.to(dtype))


def documents_at(*starts: tuple[int, ...], length: int) -> Documents:
    """Documents of sequences of ``length`` tokens that begin at these tokens of each."""
    marks = torch.zeros(len(starts), length, dtype=torch.bool)
    for row, begins in zip(marks, starts, strict=True):
        row[list(begins)] = True
    return Documents.from_starts(marks, DEVICE)


def test_documents_begin_where_marked_and_with_every_sequence() -> None:
    documents = documents_at((3, 5), (), (1,), length=6)
    assert documents.first.tolist() == [[0, 0, 0, 3, 3, 5], [0] * 6, [0, 1, 1, 1, 1, 1]]
    assert documents.last.tolist() == [[2, 2, 2, 4, 4, 5], [5] * 6, [0, 5, 5, 5, 5, 5]]
    assert documents.offsets.tolist() == [0, 3, 5, 6, 12, 13] + [18] * 58
    assert {values.dtype for values in documents} == {torch.int32}


@pytest.mark.parametrize("number", [63, 64, 127])
def test_offsets_always_close_with_the_number_of_tokens(number: int) -> None:
    offsets = documents_at(range(number), length=200).offsets.tolist()
    assert len(offsets) in (64, 128) and offsets[:number] == list(range(number)) and offsets[number] == 200


@pytest.mark.parametrize("with_documents", [False, True])
def test_attention_is_causal_and_stays_within_documents(with_documents: bool) -> None:
    q, k, v = randn(2, 9, 3, 12), randn(2, 9, 3, 12, seed=1), randn(2, 9, 3, 8, seed=2)
    documents = documents_at((3, 5), (), length=9) if with_documents else None
    ours = attention(q, k, v, softmax_scale=0.4, documents=documents)
    expected = by_definition(q, k, v, 0.4, documents)
    assert ours.shape == (2, 9, 3, 8)
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (ours, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_packed_document_gets_what_it_gets_alone() -> None:
    q, k, v = randn(1, 8, 2, 6), randn(1, 8, 2, 6, seed=1), randn(1, 8, 2, 4, seed=2)
    packed = attention(q, k, v, softmax_scale=1.0, documents=documents_at((3,), length=8))
    alone = attention(q[:, 3:], k[:, 3:], v[:, 3:], softmax_scale=1.0, documents=None)
    torch.testing.assert_close(packed[:, 3:], alone)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 9, 40])
@pytest.mark.parametrize("with_documents", [False, True])
def test_windows_sinks_and_grouped_queries(with_documents: bool, window: int | None, sinks: bool) -> None:
    q, k, v = (
        randn(2, 9, heads, width, seed=seed, dtype=torch.float64)
        for seed, (heads, width) in enumerate(((6, 12), (2, 12), (2, 8)))
    )
    inputs = [q, k, v, *([randn(6, seed=3)] if sinks else [])]
    documents = documents_at((3, 5), (), length=9) if with_documents else None
    ours = attention(
        q, k, v, softmax_scale=0.4, documents=documents, window=window, sinks=inputs[3] if sinks else None
    )  # fmt: skip
    expected = by_definition(q, k, v, 0.4, documents, window, inputs[3] if sinks else None)
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(x.sin().sum(), inputs) for x in (ours, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


INTERVALS = {
    "causal": dict(),
    "documents": dict(starts=((3, 50, 64, 65, 90), ())),
    "a window": dict(window=20),
    "a window of one": dict(window=1),
    "a wide window": dict(window=1000),
    "documents and a window": dict(starts=((3, 50, 64, 65, 90), (70,)), window=33),
    "sinks": dict(sinks=True),
    "all": dict(starts=((10, 77), (1,)), window=50, sinks=True),
}


@pytest.mark.parametrize(
    ("case", "heads", "widths"),
    [
        *((case, (2, 1), (48, 16)) for case in INTERVALS),
        *((case, (2, 2), (16, 32)) for case in ("causal", "documents")),
    ],
)
def test_the_triton_kernels_give_what_the_definition_gives(case, heads, widths) -> None:
    """Blocks of 64 queries and 32 keys: the sequence has whole ones, one cut short, and documents across their ends."""
    asked = INTERVALS[case]
    length = 110
    q = randn(2, length, heads[0], widths[0])
    k, v = randn(2, length, heads[1], widths[0], seed=1), randn(2, length, heads[1], widths[1], seed=2)
    sinks = randn(heads[0], seed=3) if asked.get("sinks") else None
    documents = documents_at(*asked["starts"], length=length) if "starts" in asked else None
    inputs = [q, k, v, *([] if sinks is None else [sinks])]
    window = asked.get("window")
    ours = attention(
        q, k, v, softmax_scale=0.2, documents=documents, window=window, sinks=sinks, backend="triton"
    )  # fmt: skip
    expected = by_definition(q, k, v, 0.2, documents, window, sinks)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    direction = randn(*ours.shape, seed=4, grad=False)
    gradients = (torch.autograd.grad((x * direction).sum(), inputs) for x in (ours, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_the_triton_kernels_take_any_length(length: int) -> None:
    q, k, v = (randn(1, length, 2, 16, seed=seed) for seed in range(3))
    documents = documents_at(tuple(range(0, length, 7)), length=length)
    ours = attention(q, k, v, softmax_scale=0.3, documents=documents, backend="triton")
    expected = by_definition(q, k, v, 0.3, documents)
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (ours, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_triton_kernels_read_heads_out_of_a_wider_tensor() -> None:
    """As latent attention gives them: keys and values are slices of one projection, queries are not."""
    both = randn(1, 40, 2, 48)
    q = randn(1, 40, 2, 32, seed=1)
    k, v = both.split((32, 16), -1)
    ours, expected = (
        attention(q, k, v, softmax_scale=0.3, backend="triton"),
        by_definition(q, k, v, 0.3, None),
    )
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(x.sin().sum(), (q, both)) for x in (ours, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("widths", "message"),
    [((20, 16), r"takes keys whose width .* not \(20, 16\)"), ((32, 48), r"values whose width is such a power")],
)
def test_widths_that_the_triton_kernels_do_not_take_are_named(widths, message) -> None:
    q, k = randn(1, 8, 2, widths[0]), randn(1, 8, 2, widths[0], seed=1)
    v = randn(1, 8, 2, widths[1], seed=2)
    with pytest.raises(KernelInputError, match=message):
        attention(q, k, v, softmax_scale=1.0, backend="triton")


def refuse(message: str, **changes: object) -> None:
    arguments = {"q": randn(1, 4, 4, 8), "k": randn(1, 4, 2, 8), "v": randn(1, 4, 2, 8), "softmax_scale": 1.0}
    with pytest.raises(KernelInputError, match=message):
        attention(**arguments | changes)


def test_inputs_that_do_not_fit_are_refused_by_name() -> None:
    refuse(r"k has 3 heads; they must divide the 4 of q", k=randn(1, 4, 3, 8), v=randn(1, 4, 3, 8))
    refuse(r"k has shape \(1, 4, 2, 9\); it must be \[B, S, Nkv, Dqk\]", k=randn(1, 4, 2, 9))
    refuse(r"v has shape", v=randn(1, 4, 4, 8))
    refuse(r"softmax_scale \(0.0\) must be positive", softmax_scale=0.0)
    refuse(r"window \(0\) must be at least 1", window=0)
    refuse(r"sinks has shape \(2,\); it must be \[N\] = \(4,\)", sinks=randn(2))
    refuse(r"documents.first has shape \(1, 3\)", documents=documents_at((), length=3))


RUNS_CUTE = torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER and cute_available("attention")
GPU_BACKENDS = [
    "torch",
    "triton",
    pytest.param("cute", marks=pytest.mark.skipif(not RUNS_CUTE, reason="needs a Hopper GPU and moescale[cute]")),
]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Argument aux_data")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", [2048, 300, 1])
def test_bf16_error_is_at_most_twice_that_of_rounding_the_result(
    length: int, with_documents: bool, backend: str
) -> None:
    dtype = torch.bfloat16
    q, k = randn(2, length, 4, 192, dtype=dtype), randn(2, length, 4, 192, dtype=dtype, seed=1)
    v = randn(2, length, 4, 128, dtype=dtype, seed=2)
    # Documents of 120 tokens, but for three of one token; of the second sequence one of all its tokens.
    starts = (*range(0, length, 120), *(n for n in (7, 8, 9) if n < length))
    documents = documents_at(starts, (), length=length) if with_documents else None
    ours = attention(q, k, v, softmax_scale=0.07, documents=documents, backend=backend)
    expected = by_definition(q, k, v, 0.07, documents)
    direction = randn(2, length, 4, 128, dtype=dtype, seed=3, grad=False)
    gradients = torch.autograd.grad((ours * direction).sum(), (q, k, v))
    exact = torch.autograd.grad((expected * direction).sum(), (q, k, v))
    for a, b in zip([ours, *gradients], [expected, *exact], strict=True):
        # bf16 rounds to 2^-9, probabilities and results once each: about 0.003 in the norm, doubled.
        # A token that sees itself alone gives q and k no gradient, but for the rounding of what cancels.
        assert (a.float() - b.float()).norm() < 0.006 * b.float().norm() + 1e-4


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Argument aux_data")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_compiled_layer_takes_any_number_of_documents(backend: str) -> None:
    dtype = torch.bfloat16
    q, k = randn(1, 512, 2, 192, dtype=dtype), randn(1, 512, 2, 192, dtype=dtype, seed=1)
    v = randn(1, 512, 2, 128, dtype=dtype, seed=2)

    def layer(documents: Documents) -> torch.Tensor:
        return attention(q, k, v, softmax_scale=0.07, documents=documents, backend=backend).sin()

    compiled = torch.compile(layer, fullgraph=True)
    for number in (1, 63, 64, 200, 511):
        documents = documents_at(tuple(range(number)), length=512)
        ours, plain = compiled(documents), layer(documents)
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=1e-2)
        (ours_q,), (plain_q,) = (torch.autograd.grad(x.float().sum(), (q,)) for x in (ours, plain))
        assert (ours_q - plain_q).norm() <= 0.02 * plain_q.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "widths", "window", "with_sinks"),
    [
        ((16, 16), (192, 128), None, False),
        ((32, 4), (128, 128), None, False),
        ((64, 8), (64, 64), 128, True),
        ((64, 8), (64, 64), None, True),
        ((20, 20), (256, 256), None, False),
    ],
)
@pytest.mark.parametrize(("length", "with_documents"), [(1000, True), (2048, True), (2048, False)])
@pytest.mark.parametrize("backend", GPU_BACKENDS[1:])
@pytest.mark.filterwarnings("ignore:Argument aux_data")
def test_the_shapes_of_the_families_are_as_exact_as_rounding_allows(
    heads, widths, window, with_sinks, length, with_documents, backend
) -> None:
    dtype = torch.bfloat16
    q = randn(1, length, heads[0], widths[0], dtype=dtype)
    k, v = (randn(1, length, heads[1], width, dtype=dtype, seed=seed) for seed, width in enumerate(widths, start=1))
    sinks = randn(heads[0], dtype=dtype, seed=4) if with_sinks else None
    inputs = [q, k, v, *([sinks] if with_sinks else [])]
    documents = documents_at((3, 250, 251, 640), length=length) if with_documents else None
    scale = widths[0] ** -0.5
    ours = attention(q, k, v, softmax_scale=scale, documents=documents, window=window, sinks=sinks, backend=backend)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    expected = by_definition(*exact_inputs[:3], scale, documents, window, exact_inputs[3] if with_sinks else None)
    direction = randn(*ours.shape, dtype=dtype, seed=5, grad=False)
    gradients = torch.autograd.grad((ours * direction).sum(), inputs)
    exact = torch.autograd.grad((expected * direction).sum(), exact_inputs)
    for name, a, b in zip(("out", "q", "k", "v", "sinks"), [ours, *gradients], [expected, *exact], strict=False):
        assert (a.double() - b).norm() < 0.006 * b.norm() + 1e-4, name


def replayed_and_computed(
    results: Callable[[Documents], list[torch.Tensor]], some: Documents, others: Documents
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of results: replayed from a CUDA graph whose documents are overwritten, and computed for them."""
    held = Documents(*(x.clone() for x in some))
    expected = {id(documents): results(documents) for documents in (some, others)}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = results(held)
    for documents in (some, others, some):
        for target, source in zip(held, documents, strict=True):
            target.copy_(source)
        graph.replay()
        yield from zip(recorded, expected[id(documents)], strict=True)


@pytest.mark.gpu
def test_the_triton_kernels_give_the_same_bits_every_time_and_in_a_graph_with_other_documents() -> None:
    from moescale.kernels.attention import triton

    dtype = torch.bfloat16
    q, k = (randn(2, 512, 4, 192, dtype=dtype, seed=seed, grad=False) for seed in range(2))
    v, grad = (randn(2, 512, 4, 128, dtype=dtype, seed=seed, grad=False) for seed in (2, 3))
    some, others = documents_at((100, 300), (), length=512), documents_at((5,), (64, 65, 400), length=512)

    def results(documents: Documents) -> list[torch.Tensor]:
        out, sums = triton.forward(q, k, v, documents.first, None, None, 0.07)
        gradients = triton.backward(
            grad, q, k, v, out, sums, documents.first, documents.last, None, None, 0.07
        )  # fmt: skip
        return [out, *gradients]

    for a, b in replayed_and_computed(results, some, others):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not RUNS_CUTE, reason="needs a Hopper GPU and moescale[cute]")
@pytest.mark.filterwarnings("ignore:Argument aux_data")
def test_attention_in_cute_is_recorded_with_windows_sinks_and_documents_that_change() -> None:
    dtype = torch.bfloat16
    q, k, v = (randn(2, 512, heads, 64, dtype=dtype, seed=seed) for seed, heads in enumerate((8, 2, 2)))
    sinks = randn(8, seed=3)
    some, others = documents_at((100, 300), (), length=512), documents_at((5,), (64, 65, 400), length=512)
    direction = randn(2, 512, 8, 64, dtype=dtype, seed=4, grad=False)

    def results(documents: Documents) -> list[torch.Tensor]:
        out = attention(q, k, v, softmax_scale=0.1, documents=documents, window=60, sinks=sinks, backend="cute")
        return [out.detach(), *torch.autograd.grad(out, (q, k, v, sinks), direction)]

    for a, b in replayed_and_computed(results, some, others):  # sums over blocks come in any order
        assert (a.float() - b.float()).norm() <= 1e-3 * b.float().norm()
