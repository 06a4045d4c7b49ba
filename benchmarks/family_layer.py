"""Times one decoder layer of a family at its published shapes, forward and backward: ours and transformers, compiled.

    python benchmarks/family_layer.py --models gpt-oss-20b,qwen3-30b-a3b \
                                      --output benchmarks/results/h200/family_layer.json

Both have the same weights in bf16, and the results are compared before anything is timed. Of transformers every way of
attention that runs is timed, the fastest is what counts. Both are timed as the host launches them and as a CUDA graph,
where one can be recorded, and the faster counts; a sample is four calls in a row, as layers and micro-batches follow
each other in a step. Layers with and without a window are rows of their own. Where all of a layer's GEMMs can be in
fp8, ours is timed so as well; its copies of the weights, which a step makes once for all its micro-batches, are timed
apart.
``--device cpu --tokens 64 --divide 16`` checks the program on a small layer.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config, to_hf_config
from moescale.convert.key_table import build_key_table
from moescale.errors import ConfigError
from moescale.models.flops import flops_per_token
from moescale.models.fp8_gemms import use_fp8, write_weight_copies
from moescale.models.transformer import Transformer, build_on_meta, initialize, named_weights
from moescale.tools.measurement import describe_measurement, write_result

CALLS_OF_A_SAMPLE = 4
WAYS_OF_ATTENTION = ("sdpa", "flex_attention", "eager")


def one_layer(config: ModelConfig, layer: int, divide: int) -> ModelConfig:
    """The model of one layer with experts, number ``layer``, without its vocabulary; widths smaller by ``divide``."""
    changes: dict[str, Any] = {"num_layers": 1, "vocab_size": 256, "first_moe_layer": 0, "num_prediction_layers": 0}
    if hasattr(config, "windowed_layers"):
        changes["windowed_layers"] = (0,) if layer in config.windowed_layers else ()
    for name in ("hidden_size", "expert_intermediate_size", "dense_intermediate_size"):
        changes[name] = max(64, getattr(config, name) // divide // 64 * 64) if divide > 1 else getattr(config, name)
    return dataclasses.replace(config, **changes)


def theirs(config: ModelConfig, ours: Transformer, attention: str, device: torch.device) -> torch.nn.Module:
    """The same layer in transformers, with the same weights."""
    document = to_hf_config(config)
    hf_config = AutoConfig.for_model(**document)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=attention, dtype=torch.bfloat16)
    weights, parameters = named_weights(ours), dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, pieces in build_key_table(config).items():
            for piece in pieces:
                value = piece.to_stored(weights[name][piece.index])
                if piece.key in parameters:
                    parameters[piece.key].copy_(value.reshape(piece.shape))
                    continue
                # transformers stacks experts in memory, gate above up.
                module, expert, kind, _ = piece.key.rsplit(".", 3)
                stacked = parameters[f"{module}.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"]
                rows = stacked[int(expert)]
                part = rows if kind == "down_proj" else rows.chunk(2)[kind == "up_proj"]
                part.copy_(value.reshape(piece.shape))
    return model


def run_of_theirs(model: torch.nn.Module, x: torch.Tensor, has_window: bool) -> Callable[[], torch.Tensor]:
    create = create_sliding_window_causal_mask if has_window else create_causal_mask
    mask = create(config=model.config, inputs_embeds=x, attention_mask=None, past_key_values=None)
    positions = model.model.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None])
    layer = torch.compile(model.model.layers[0]) if x.is_cuda else model.model.layers[0]

    def run() -> torch.Tensor:
        out = layer(x, attention_mask=mask, position_embeddings=positions)
        return out[0] if isinstance(out, tuple) else out

    return run


def run_of_ours(model: Transformer, config: ModelConfig, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    cos, sin = model.positions(config, x.shape[1], x.device)
    layer = torch.compile(model.layers[0]) if x.is_cuda else model.layers[0]
    return lambda: layer(x, cos, sin).hidden


def copy_in_fp8(config: ModelConfig, model: Transformer, device: torch.device) -> Transformer | None:
    """``model`` with all GEMMs of its layer in fp8; None where it has some that cannot be, or the device cannot."""
    copy = build_on_meta(config, torch.bfloat16).to_empty(device=device)
    copy.load_state_dict(model.state_dict())
    try:
        use_fp8(copy, experts=True, dense=True)
    except ConfigError:
        return None
    write_weight_copies(copy)
    return copy


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach() - expected).norm() / expected.norm())


def recorded(step: Callable[[], object]) -> Callable[[], object] | None:
    """``step`` as a CUDA graph, as a run of one GPU replays its micro-batches; None where it cannot be recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except Exception:  # whatever a model does that waits for the GPU
        torch.cuda.synchronize()
        return None
    return graph.replay


def median_milliseconds(step: Callable[[], object], repeats: int, on_gpu: bool) -> float:
    """Median time of a call in samples of ``CALLS_OF_A_SAMPLE``, after three samples that are not counted."""
    times = []
    for _ in range(3 + repeats):
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS_OF_A_SAMPLE):
            step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / CALLS_OF_A_SAMPLE)
    return statistics.median(times[3:]) * 1e3


def timed(run: Callable[[], torch.Tensor], inputs: list[torch.Tensor], repeats: int) -> dict[str, float | None]:
    """Milliseconds of a forward and backward, launched by the host and replayed as a graph."""
    grad = torch.randn_like(run())

    def step() -> object:
        return torch.autograd.grad(run(), inputs, grad, allow_unused=True)

    found: dict[str, float | None] = {"launched_ms": median_milliseconds(step, repeats, grad.is_cuda)}
    replay = recorded(step) if grad.is_cuda else None
    found["recorded_ms"] = None if replay is None else median_milliseconds(replay, repeats, grad.is_cuda)
    return found | {"milliseconds": min(value for value in found.values() if value is not None)}


def measure(name: str, layer: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    config = one_layer(read_model_config(name), layer, options.divide)
    model = build_on_meta(config, torch.bfloat16).to_empty(device=device)
    initialize(model, seed=0)
    torch.manual_seed(0)
    sequences = max(1, options.tokens // options.sequence_length)
    length = min(options.tokens, options.sequence_length)
    x = torch.randn(sequences, length, config.hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    has_window = bool(getattr(config, "windowed_layers", ()))
    # Of the layer alone: what the loss and the embedding cost is left out.
    flops = flops_per_token(config, length) - 6.0 * config.hidden_size * config.vocab_size
    row = {"scope": "decoder_layer", "model": name, "layer": layer, "tokens": sequences * length, "length": length}

    def measured(run: Callable[[], torch.Tensor], module: torch.nn.Module) -> dict[str, Any]:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        took = timed(run, [x, *parameters], options.repeats)
        return row | took | {"tflops": flops * sequences * length / (took["milliseconds"] or 0.0) / 1e9}

    run = run_of_ours(model, config, x)
    expected = run().detach()
    yield measured(run, model.layers[0]) | {"backend": "moescale"}
    in_fp8 = copy_in_fp8(config, model, device)
    if in_fp8 is not None:
        torch._dynamo.reset()
        run = run_of_ours(in_fp8, config, x)
        found = {"difference": relative_difference(run(), expected)} | measured(run, in_fp8.layers[0])
        found["copies_ms"] = median_milliseconds(lambda: write_weight_copies(in_fp8), options.repeats, x.is_cuda)
        yield found | {"backend": "moescale, fp8"}
        run = in_fp8 = None
    for attention in options.attention:
        torch._dynamo.reset()
        try:
            peer = theirs(config, model, attention, device)
            run = run_of_theirs(peer, x, has_window)
            difference = relative_difference(run(), expected)
            found = measured(run, peer.model.layers[0]) | {"difference": difference}
        except Exception as error:  # a way of attention that this model, or this machine, does not have
            found = row | {"error": f"{type(error).__name__}: {error}"[:300]}
        yield found | {"backend": f"transformers, {attention}"}
        peer = run = None
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt-oss-20b,qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--attention", nargs="*", default=WAYS_OF_ATTENTION, help="of transformers")
    parser.add_argument("--divide", type=int, default=1, help="make widths smaller by this, to try the program")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.models.split(","):
        layers = (0, 1) if hasattr(read_model_config(name), "windowed_layers") else (0,)
        for layer in layers:
            for row in measure(name, layer, options):
                rows.append(row)
                print(row, flush=True)
                if options.output is not None:  # after each: the last may be cut off
                    write_result(
                        options.output,
                        describe_measurement("transformers", "quack-kernels", "flash-attn-4") | {"rows": rows},
                    )


if __name__ == "__main__":
    main()
