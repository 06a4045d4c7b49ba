"""The functions that make up the expert MLP, by back end."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace

from moescale.kernels.experts import reference


def operators_of(backend: str) -> SimpleNamespace:
    """Return the functions that make up the operator in a back end, with one signature."""
    if backend in ("triton", "cute"):
        return _exported_by(backend)
    if backend == "triton+cute":
        return _triton_with_gradients_in_cute()
    bind = functools.partial
    return SimpleNamespace(
        add_bias_products=reference.add_bias_products,
        bias_gradient=reference.bias_gradient,
        combine_rows=reference.combine_rows,
        gather_rows=reference.gather_rows,
        group_rows=reference.group_rows,
        multiply_down_dgrad=bind(reference.multiply_down_dgrad, backend=backend),
        multiply_rows=bind(reference.multiply_rows, backend=backend),
        multiply_up=bind(reference.multiply_up, backend=backend),
        order_by_pair=reference.order_by_pair,
        sort_weights=reference.sort_weights,
        weight_gradient=bind(reference.weight_gradient, backend=backend),
    )


def _exported_by(backend: str) -> SimpleNamespace:
    module = importlib.import_module(f"moescale.kernels.experts.{backend}")
    return SimpleNamespace(**{name: getattr(module, name) for name in module.__all__})


def _triton_with_gradients_in_cute() -> SimpleNamespace:
    """Triton's functions but for the weight gradients, which CuTe computes as fast with biases as without."""
    ops, cute = _exported_by("triton"), _exported_by("cute")
    weight_gradient = functools.partial(cute.weight_gradient, by_pairs=False)
    return SimpleNamespace(**(vars(ops) | {"group_rows": cute.group_rows, "weight_gradient": weight_gradient}))
