"""Times the operators around the experts, and whole blocks, on one GPU: ours beside torch.compile and transformers.

    python benchmarks/layer.py --output benchmarks/results/h200/layer.json [--sections elementwise,mla,...]
                               [--merge benchmarks/results/h200/experts.json]

Shapes are DeepSeek-Coder-V2-Lite's at 4 x 2,048 tokens in bf16. Times are medians with device events; every operator's
bytes are what it must read and write once, as a share of what a device-to-device copy moves in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from moescale.kernels.attention import Documents, attention
from moescale.kernels.backends import runs_cute
from moescale.kernels.cross_entropy import linear_cross_entropy
from moescale.kernels.normed_rope import normed_half_rope
from moescale.kernels.rms_norm import add_rms_norm, rms_norm
from moescale.kernels.rope import mla_rope
from moescale.kernels.router import route, router_logits
from moescale.kernels.swiglu import swiglu
from moescale.models.blocks.mla import LatentAttention
from moescale.models.blocks.rope import rope_tables
from moescale.models.deepseek_v2.config import DeepSeekV2Config
from moescale.models.transformer import Block
from moescale.tools.measurement import describe_measurement, write_result

BATCH, LENGTH = 4, 2048
TOKENS = BATCH * LENGTH
CONFIG = DeepSeekV2Config(
    vocab_size=102400,
    hidden_size=2048,
    num_layers=27,
    num_heads=16,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    attention_bias=False,
    dense_intermediate_size=10944,
    expert_intermediate_size=1408,
    num_experts=64,
    num_shared_experts=2,
    top_k=6,
    first_moe_layer=1,
    moe_layer_frequency=1,
    routing_method="greedy",
    num_groups=1,
    top_k_groups=1,
    normalize_topk=False,
    routed_scaling_factor=1.0,
    aux_loss_alpha=0.001,
    aux_loss_per_sequence=True,
    rms_norm_eps=1e-6,
    tie_embeddings=False,
    max_sequence_length=LENGTH,
    rope_theta=10000.0,
    yarn=None,
    initializer_std=0.02,
)


def randn(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(grad)


def time_forward_backward(
    operator: Callable[[], tuple[torch.Tensor, ...]], inputs: list[torch.Tensor], repeats: int = 30
) -> dict[str, float]:
    """Medians of forward and backward milliseconds, and peak bytes above what was allocated before."""
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    forward, backward = [], []
    for repeat in range(repeats + 5):
        if repeat == 5:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        flush.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        events[0].record()
        outputs = operator()
        events[1].record()
        gradients = [torch.randn_like(x) for x in outputs]
        flush.zero_()
        events[2].record()
        grads = torch.autograd.grad(outputs, inputs, gradients)
        events[3].record()
        del outputs, grads, gradients
        events[3].synchronize()
        if repeat >= 5:
            forward.append(events[0].elapsed_time(events[1]))
            backward.append(events[2].elapsed_time(events[3]))
    peak = torch.cuda.max_memory_allocated() - before
    return {
        "forward_ms": statistics.median(forward),
        "backward_ms": statistics.median(backward),
        "peak_bytes": peak,
    }


def copy_bytes_per_second() -> float:
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.numel() / statistics.median(times) * 1e3


def graph_milliseconds(operator: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call inside a replayed CUDA graph of several: no launch gaps, inputs rotate out of L2."""
    calls = 10
    flush = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            operator()
        graphs = []
        for body in (True, False):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(calls):
                    flush.zero_()
                    if body:
                        operator()
            graphs.append(graph)
    times: list[list[float]] = [[], []]
    for _ in range(repeats):
        for graph, list_of_times in zip(graphs, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            list_of_times.append(start.elapsed_time(end))
    return (statistics.median(times[0]) - statistics.median(times[1])) / calls


def elementwise(rows: list[dict]) -> None:
    """Forward and backward of every element-wise operator, Triton beside torch.compile of the reference."""
    hidden = CONFIG.hidden_size
    copy_rate = copy_bytes_per_second()
    rows.append({"scope": "copy", "backend": "torch", "bytes_per_second": copy_rate})
    cos, sin = rope_tables(CONFIG, LENGTH, torch.device("cuda"))
    x, y, weight = randn(TOKENS, hidden), randn(TOKENS, hidden), randn(hidden)
    latent = randn(BATCH, LENGTH, 576, grad=False)[..., :512].requires_grad_()
    gate_up = randn(TOKENS, 2 * 2816)
    q, kv, k_rope = randn(BATCH, LENGTH, 16, 192), randn(BATCH, LENGTH, 16, 256), randn(BATCH, LENGTH, 64)
    heads, gain = randn(BATCH, LENGTH, 32, 128), randn(128)  # of Qwen3-30B-A3B's queries
    angles = torch.randn(LENGTH, 64, device="cuda")
    tables = angles.cos(), angles.sin()
    logits = torch.randn(TOKENS, 64, device="cuda", requires_grad=True)
    routing = {"top_k": 6, "group_limited": False, "normalize_topk": False, "routed_scaling_factor": 1.0}
    row, table = TOKENS * hidden * 2, TOKENS * 64 * 4
    cases: list[tuple[str, Callable, list[torch.Tensor], int, int]] = [
        ("rms_norm", lambda b: (rms_norm(x, weight, 1e-6, backend=b),), [x, weight], 2 * row, 3 * row),
        (
            "rms_norm_latent",
            lambda b: (rms_norm(latent, weight[:512], 1e-6, backend=b),),
            [latent],
            row // 2,
            3 * row // 4,
        ),
        ("add_rms_norm", lambda b: add_rms_norm(x, y, weight, 1e-6, backend=b), [x, y, weight], 4 * row, 4 * row),
        ("swiglu", lambda b: (swiglu(gate_up, backend=b),), [gate_up], TOKENS * 2816 * 6, TOKENS * 2816 * 10),
        (
            "mla_rope",
            lambda b: mla_rope(q, kv, k_rope, cos, sin, backend=b),
            [q, kv, k_rope],
            TOKENS * 2 * (16 * (192 + 256 + 192 + 192 + 128) + 64),
            TOKENS * 2 * (16 * (192 + 256 + 192 + 192 + 128) + 64),
        ),
        (
            "normed_half_rope",
            lambda b: (normed_half_rope(heads, gain, *tables, 1e-6, backend=b),),
            [heads, gain],
            TOKENS * 32 * 128 * 4,
            TOKENS * 32 * 128 * 6,
        ),
        (
            "route",
            lambda b: route(logits, **routing, num_sequences=BATCH, backend=b)[1::2],
            [logits],
            table + TOKENS * 6 * 8,
            2 * table + TOKENS * 6 * 12,
        ),
    ]
    for name, operator, inputs, forward_bytes, backward_bytes in cases:
        for backend in ("triton", "compiled"):
            run = operator
            if backend == "compiled":
                torch._dynamo.reset()
                run = torch.compile(operator)
            argument = "triton" if backend == "triton" else "torch"
            outputs = run(argument)
            gradients = [torch.randn_like(o) for o in outputs]
            torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)
            with torch.no_grad():
                forward_ms = graph_milliseconds(lambda run=run, argument=argument: run(argument))
            backward_ms = graph_milliseconds(
                lambda o=outputs, i=inputs, g=gradients: torch.autograd.grad(o, i, g, retain_graph=True)
            )
            rows.append(
                {
                    "scope": name,
                    "tokens": TOKENS,
                    "backend": backend,
                    "forward_ms": forward_ms,
                    "backward_ms": backward_ms,
                    "forward_share_of_copy": forward_bytes / forward_ms * 1e3 / copy_rate,
                    "backward_share_of_copy": backward_bytes / backward_ms * 1e3 / copy_rate,
                }
            )
    weight = randn(64, hidden)
    for backend, run in {
        "moescale": lambda: (router_logits(x, weight),),
        "fp32_copies": lambda: (F.linear(x.float(), weight.float()),),
    }.items():
        rows.append(
            {"scope": "router_logits", "tokens": TOKENS, "backend": backend} | time_forward_backward(run, [x, weight])
        )


def attention_paths(rows: list[dict]) -> None:
    """Attention alone: causal, and within documents of about 300 tokens by the ways torch offers."""
    q, k, v = randn(BATCH, LENGTH, 16, 192), randn(BATCH, LENGTH, 16, 192), randn(BATCH, LENGTH, 16, 128)
    starts = (torch.arange(LENGTH) % 300 == 0).expand(BATCH, -1)
    packed = Documents.from_starts(starts, torch.device("cuda"))
    documents = packed.first
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    mask = (documents[:, :, None] == documents[:, None, :]).tril().unsqueeze(1)
    bias = torch.zeros_like(mask, dtype=torch.bfloat16).masked_fill_(~mask, float("-inf"))
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sdpa(kernel: SDPBackend, **kwargs: object) -> Callable[[], tuple[torch.Tensor]]:
        def run() -> tuple[torch.Tensor]:
            with sdpa_kernel([kernel]):
                return (F.scaled_dot_product_attention(*heads_first, scale=0.07, **kwargs),)

        return run

    def same_document(b, h, i, j):
        return (documents[b, i] == documents[b, j]) & (i >= j)

    def flex() -> tuple[torch.Tensor]:
        block_mask = compiled_mask(same_document, BATCH, None, LENGTH, LENGTH, device="cuda")
        return (compiled_flex(*heads_first, block_mask=block_mask, scale=0.07),)

    def ours(documents: Documents | None, backend: str) -> tuple[torch.Tensor]:
        return (attention(q, k, v, softmax_scale=0.07, documents=documents, backend=backend),)

    backends = ("torch", "cute") if runs_cute("attention", torch.device("cuda"), torch.bfloat16) else ("torch",)
    compiled_mask, compiled_flex = torch.compile(create_block_mask), torch.compile(flex_attention)
    paths = {
        **{
            f"moescale {backend} {name}": partial(ours, documents, backend)
            for backend in backends
            for name, documents in (("causal", None), ("documents", packed))
        },
        "cudnn causal": sdpa(SDPBackend.CUDNN_ATTENTION, is_causal=True),
        "cudnn documents, bool mask": sdpa(SDPBackend.CUDNN_ATTENTION, attn_mask=mask),
        "cudnn documents, additive mask": sdpa(SDPBackend.CUDNN_ATTENTION, attn_mask=bias),
        "efficient documents, additive mask": sdpa(SDPBackend.EFFICIENT_ATTENTION, attn_mask=bias),
        "flex documents, mask built": flex,
    }
    for name, run in paths.items():
        try:
            result = time_forward_backward(run, [q, k, v], repeats=10)
        except Exception as error:  # a path this machine lacks is a finding, not a failure
            result = {"error": str(error).splitlines()[0][:200]}
        rows.append({"scope": "attention", "tokens": TOKENS, "backend": name} | result)


def hf_layer(kind: str) -> tuple[torch.nn.Module, torch.Tensor]:
    import transformers.models.deepseek_v2.modeling_deepseek_v2 as hf

    config = hf.DeepseekV2Config(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        intermediate_size=CONFIG.dense_intermediate_size,
        moe_intermediate_size=CONFIG.expert_intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_shared_experts=2,
        n_routed_experts=64,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        topk_method="greedy",
        norm_topk_prob=False,
        max_position_embeddings=LENGTH,
        attn_implementation="sdpa",
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        layer = hf.DeepseekV2Attention(config, 1) if kind == "mla" else hf.DeepseekV2DecoderLayer(config, 1)
        torch.set_default_dtype(torch.float32)
        rotary = hf.DeepseekV2RotaryEmbedding(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = randn(1, LENGTH, 1, grad=False)
    return layer, rotary(x, torch.arange(LENGTH, device="cuda").unsqueeze(0))


def our_layer(kind: str) -> torch.nn.Module:
    with torch.device("cuda"):
        layer = (
            LatentAttention(CONFIG)
            if kind == "mla"
            else Block(CONFIG, 1, lambda config, layer: LatentAttention(config))
        )
    layer = layer.to(torch.bfloat16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer


def layer_flops(kind: str) -> float:
    """Forward and backward FLOPs of the matrix products, attention counted causal."""
    h, n = CONFIG.hidden_size, CONFIG.num_heads
    weights = h * n * 192 + h * 576 + 512 * n * 256 + n * 128 * h
    if kind == "decoder_layer":
        weights += h * 64 + 3 * h * 1408 * (6 + 2)
    scores = n * (192 + 128) * LENGTH / 2
    return 6 * TOKENS * (weights + scores)


def compare_layers(rows: list[dict], kind: str) -> None:
    x = randn(BATCH, LENGTH, CONFIG.hidden_size)
    cos, sin = rope_tables(CONFIG, LENGTH, torch.device("cuda"))

    def measure(name: str, layer: torch.nn.Module, run: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        result = time_forward_backward(run, [x, *layer.parameters()])
        milliseconds = result["forward_ms"] + result["backward_ms"]
        rows.append(
            {"scope": kind, "tokens": TOKENS, "backend": name, "tflops": layer_flops(kind) / milliseconds / 1e9}
            | result
        )

    layer = our_layer(kind)
    for name, module in {"triton": torch.compile(layer), "triton, eager": layer}.items():
        if kind == "mla":
            measure(name, layer, lambda module=module: (module(x, cos, sin),))
        else:
            measure(name, layer, lambda module=module: module(x, cos, sin)[:2])
    del layer, module
    torch._dynamo.reset()
    layer, positions = hf_layer(kind)
    compiled = torch.compile(layer)

    def run_hf() -> tuple[torch.Tensor]:
        out = compiled(x, attention_mask=None, position_embeddings=positions)
        return (out[0] if isinstance(out, tuple) else out,)

    measure("transformers", layer, run_hf)


def cross_entropy(rows: list[dict]) -> None:
    hidden, weight = randn(TOKENS, CONFIG.hidden_size), randn(CONFIG.vocab_size, CONFIG.hidden_size, grad=False)
    weight = (weight * 0.02).requires_grad_()
    targets = torch.randint(CONFIG.vocab_size, (TOKENS,), device="cuda")

    def materialised() -> tuple[torch.Tensor]:
        return (F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum"),)

    variants = {
        "triton": lambda: (linear_cross_entropy(hidden, weight, targets),),
        "materialised": materialised,
        "materialised, compiled": torch.compile(materialised),
    }
    for name, run in variants.items():
        result = time_forward_backward(run, [hidden, weight], repeats=10)
        milliseconds = result["forward_ms"] + result["backward_ms"]
        flops = 6 * TOKENS * CONFIG.hidden_size * CONFIG.vocab_size
        rows.append(
            {"scope": "cross_entropy", "tokens": TOKENS, "backend": name, "tflops": flops / milliseconds / 1e9} | result
        )


SECTIONS: dict[str, Callable[[list[dict]], None]] = {
    "elementwise": elementwise,
    "attention": attention_paths,
    "cross_entropy": cross_entropy,
    "mla": lambda rows: compare_layers(rows, "mla"),
    "decoder_layer": lambda rows: compare_layers(rows, "decoder_layer"),
}


def merge_into(path: Path, rows: list[dict], commit: object) -> None:
    """Put the rows of whole blocks into the result of ``moescale bench experts``, in place of older ones."""
    document = json.loads(path.read_text())
    merged = []
    for row in rows:
        if row["scope"] in ("mla", "cross_entropy", "decoder_layer") and "error" not in row:
            routed = row["scope"] == "decoder_layer"
            merged.append(
                {
                    "scope": row["scope"],
                    "tokens": row["tokens"],
                    "num_experts": CONFIG.num_experts if routed else None,
                    "top_k": CONFIG.top_k if routed else None,
                    "routing": "random router" if routed else None,
                    "backend": row["backend"],
                    **{name: round(row[name], 4) for name in ("forward_ms", "backward_ms", "tflops")},
                    "peak_bytes": row["peak_bytes"],
                    "commit": commit,
                }
            )
    replaced = {row["scope"] for row in merged}
    document["rows"] = [row for row in document["rows"] if row["scope"] not in replaced] + merged
    path.write_text(json.dumps(document, indent=1) + "\n")


def print_table(rows: list[dict]) -> None:
    for row in rows:
        figures = [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key not in ("scope", "backend", "tokens")
        ]
        print(f"{row['scope']:16} {row['backend']:34} " + "  ".join(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--merge", type=Path, help="result of `moescale bench experts` to put the blocks' rows into")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict] = []
    for section in arguments.sections.split(","):
        try:
            SECTIONS[section](rows)
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()
    described = describe_measurement("transformers")
    write_result(arguments.output, described | {"rows": rows})
    if arguments.merge is not None:
        merge_into(arguments.merge, rows, described["commit"])
    print_table(rows)


if __name__ == "__main__":
    main()
