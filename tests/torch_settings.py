"""Torch's settings of a process. As a program: what they are after one use of torch or the package, and what it set.

PyTorch makes some of them at first use, so a process in which torch has already run tells nothing.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F

PLAIN = (bool, int, float, str, list, type(None))
OF_A_THREAD = {"_set_grad_enabled"}


def settings() -> dict[str, str]:
    """What torch can be told for the whole process, and what it is now."""
    backends = torch.backends
    found = {
        "flash attention": backends.cuda.flash_sdp_enabled(),
        "memory-efficient attention": backends.cuda.mem_efficient_sdp_enabled(),
        "attention by its definition": backends.cuda.math_sdp_enabled(),
        "attention in cuDNN": backends.cuda.cudnn_sdp_enabled(),
        "fp32 GEMMs on a GPU": backends.cuda.matmul.fp32_precision,
        "fp32 convolutions on a GPU": backends.cudnn.conv.fp32_precision,
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "gradients": torch.is_grad_enabled(),
        "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "synchronisation": torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else None,
    }
    for setter in (name for name in dir(torch._C) if name.startswith("_set_")):
        getter = getattr(torch._C, setter.replace("_set_", "_get_", 1), None)
        try:
            found |= {} if getter is None else {setter: getter()}
        except TypeError:  # takes an argument: is of a tensor, not of the process
            continue
    for module in ("torch._dynamo.config", "torch._functorch.config", "torch._inductor.config"):
        values = importlib.import_module(module).get_config_copy()
        found |= {f"{module}.{name}": value for name, value in values.items() if isinstance(value, PLAIN)}
    return {name: str(value) for name, value in found.items()}


@contextmanager
def setters_called() -> Iterator[list[str]]:
    """The names of torch's setters that are called within, also by a context that restores what it has set."""
    called: list[str] = []
    found = {name: getattr(torch._C, name) for name in dir(torch._C) if name.startswith(("_set_", "set_"))}

    def recording(name: str):
        def call(*arguments, **options):
            called.append(name)
            return found[name](*arguments, **options)

        return call

    for name in found.keys() - OF_A_THREAD:
        setattr(torch._C, name, recording(name))
    try:
        yield called
    finally:
        for name, setter in found.items():
            setattr(torch._C, name, setter)


def use_torch(device: str, dtype: torch.dtype) -> None:
    """Attention in PyTorch alone."""
    q = torch.randn(2, 2, 32, 16, device=device, dtype=dtype, requires_grad=True)
    F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()


def use_attention(device: str, dtype: torch.dtype) -> None:
    """Attention of every kind, forward and backward."""
    from moescale.kernels.attention import Documents, attention

    starts = torch.arange(32).repeat(2, 1) % 9 == 0
    documents = Documents.from_starts(starts, torch.device(device))
    for options in ({}, {"documents": documents}, {"window": 8}, {"sinks": torch.zeros(4, device=device)}):
        q, k, v = (torch.randn(2, 32, heads, 64, device=device, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
        attention(q, k, v, softmax_scale=0.1, backend="torch", **options).sum().backward()


def use_package(device: str, dtype: torch.dtype) -> None:
    """Every module that can be imported here, and a micro-batch of a model."""
    import moescale

    for module in pkgutil.walk_packages(moescale.__path__, "moescale."):
        if not module.name.endswith((".__main__", ".cute")):  # those of the extra may set what they like
            with suppress(ImportError):  # of an optional package
                importlib.import_module(module.name)

    from moescale.models.transformer import build_on_meta, initialize
    from moescale.runtime.micro_batch import MicroBatches
    from tiny import tiny_config

    model = build_on_meta(tiny_config(), dtype).to_empty(device=device)
    initialize(model, 0)
    runner = MicroBatches(model, capture=False)
    runner.start_step(num_targets=64, num_micro_batches=1)
    tokens = torch.randint(96, (2, 32))
    runner.run(tokens, tokens)


def main() -> None:
    use, device = sys.argv[1:]
    with setters_called() as called:
        globals()[f"use_{use}"](device, torch.float32 if device == "cpu" else torch.bfloat16)
    print(json.dumps({"settings": settings(), "set": sorted(set(called))}))


if __name__ == "__main__":
    main()
