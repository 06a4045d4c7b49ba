"""Which implementation an operator runs with, and how its inputs are refused.

Four back ends sit behind one signature: ``triton`` (our kernels; CUDA GPUs from Ampere on), ``grouped_mm`` (PyTorch's
grouped matrix product), ``torch`` (plain PyTorch, the readable definition) and ``cute`` (the experts' products and
attention in CuTe, from the optional packages quack-kernels and flash-attn-4; Hopper, bf16). ``auto`` picks by device,
capability and what is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch

from moescale.errors import MoescaleError, nearest

Backend = Literal["triton", "grouped_mm", "torch", "cute"]
BACKENDS: tuple[str, ...] = get_args(Backend)
ExpertsBackend = Literal["auto", "triton", "grouped_mm", "torch", "cute"]
AttentionBackend = Literal["auto", "torch", "triton", "cute"]

# Ampere: the first generation with bf16 tensor cores and asynchronous copies, which the kernels are written for.
MINIMUM_CAPABILITY = (8, 0)
HOPPER = (9, 0)

CutePart = Literal["experts", "attention"]
AttentionFeature = Literal["windows", "sinks", "grouped queries"]
# What each part of the back end ``cute`` imports, and the package that has it.
CUTE_PACKAGES: dict[CutePart, tuple[str, str]] = {
    "experts": ("quack", "quack-kernels"),
    "attention": ("flash_attn.cute", "flash-attn-4"),
}
# Widths of key and value at which attention in CuTe is tested: of gpt-oss, Qwen3 and OLMoE, DeepSeek, GLM-4.7-Flash.
CUTE_ATTENTION_WIDTHS = ((64, 64), (128, 128), (192, 128), (256, 256))
# Of these, where cuDNN is faster for plain causal attention (benchmarks/results/h100/family_attention.json).
CUDNN_FASTER_WIDTHS = ((256, 256),)
MAX_ATTENTION_WIDTH = 256


VARIABLES = {"experts": "MOESCALE_EXPERTS", "attention": "MOESCALE_ATTENTION"}
"""Variables of the environment that override a run's backends, for trying one out."""


class KernelInputError(MoescaleError, ValueError):
    """An operator was called with a shape, dtype, device or expert id that it cannot take."""


@dataclass(frozen=True, kw_only=True)
class BackendSettings:
    """Backends that ``auto`` stands for, by operator; ``auto`` here picks by device and what is installed."""

    experts: ExpertsBackend = "auto"
    attention: AttentionBackend = "auto"

    def overridden_by_environment(self) -> tuple[BackendSettings, list[str]]:
        """Return the settings with what VARIABLES say in the environment, and a notice for each that changes one.

        Raises KernelInputError for a value that is not a backend.
        """
        changed, notices = {}, []
        known = {"experts": get_args(ExpertsBackend), "attention": get_args(AttentionBackend)}
        for field in fields(self):
            variable, setting = VARIABLES[field.name], getattr(self, field.name)
            value = os.environ.get(variable, setting)
            if value not in known[field.name]:
                names = known[field.name]
                raise KernelInputError(
                    f"{variable} ({value!r}) in the environment must be one of {', '.join(names)}"
                    f"{nearest(value, names)}; unset it for the run's own {field.name}_backend"
                )
            if value != setting:
                changed[field.name] = value
                notices.append(f"{variable}={value} in the environment overrides {field.name}_backend ({setting})")
        return BackendSettings(**(vars(self) | changed)), notices


_defaults = BackendSettings()


@contextmanager
def default_backends(settings: BackendSettings) -> Iterator[None]:
    """Let ``auto`` stand for ``settings`` in this process while the context lasts."""
    global _defaults
    before = _defaults
    _set_defaults(settings)
    try:
        yield
    finally:
        _set_defaults(before)


def _set_defaults(settings: BackendSettings) -> None:
    global _defaults
    if settings != _defaults and "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # what is compiled has the old choice as a constant
    _defaults = settings


def _asked_for(part: CutePart) -> str:
    """Return the backend that ``auto`` stands for: the environment's, or that of :func:`default_backends`."""
    return os.environ.get(VARIABLES[part], getattr(_defaults, part))


def debug_checks_enabled() -> bool:
    """Whether operators check values (expert ids) as well as shapes; that synchronises with the device."""
    return os.environ.get("MOESCALE_DEBUG", "0") not in ("", "0")


@functools.cache
def triton_available() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def cute_available(part: CutePart) -> bool:
    """Whether the packages of the back end ``cute`` for ``part`` are installed."""
    try:
        return triton_available() and importlib.util.find_spec(CUTE_PACKAGES[part][0]) is not None
    except Exception:  # finding a module imports the package that it lies in: absent, or another's and broken
        return False


@functools.cache
def cute_usable(part: CutePart) -> bool:
    """Whether what is installed can be imported: it comes with a compiler of its own. Warns where it cannot."""
    try:
        importlib.import_module(f"moescale.kernels.{part}.cute")
    except Exception as error:  # whatever a broken installation raises; there is another back end
        warnings.warn(
            f"{CUTE_PACKAGES[part][1]} is installed but cannot be used ({type(error).__name__}: {error}); install it "
            "again by pip install 'moescale[cute]', or remove it",
            stacklevel=2,
        )
        return False
    return True


def runs_cute(part: CutePart, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the back end ``cute`` can run ``part`` there."""
    return objection_to_cute(part, device, dtype) is None and cute_usable(part)


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


# A compiled layer asks at trace time: device and dtype are constants there, the capability query is not traceable.
@torch.compiler.assume_constant_result
def choose_backend(device: torch.device, dtype: torch.dtype, requested: str = "auto") -> str:
    """Return the back end that runs an operator on ``device`` in ``dtype``.

    ``auto`` takes Triton on CUDA from capability 8.0 on, ``grouped_mm`` for bf16 on older CUDA devices and plain torch
    everywhere else. A back end asked for by name is used or refused with :class:`KernelInputError`, never replaced; but
    ``cute`` has the experts' products and attention alone, and Triton for everything else.
    """
    if requested == "cute":
        requested = "triton"
    if requested != "auto":
        return _checked_request(device, dtype, requested)
    if device.type != "cuda":
        return "torch"
    if triton_available() and torch.cuda.get_device_capability(device) >= MINIMUM_CAPABILITY:
        return "triton"
    return "grouped_mm" if dtype == torch.bfloat16 else "torch"


def runs_triton(device: torch.device, dtype: torch.dtype, backend: str) -> bool:
    """Whether an operator without a ``grouped_mm`` form runs its Triton kernels; otherwise it runs plain torch."""
    return choose_backend(device, dtype, backend) == "triton"


@torch.compiler.assume_constant_result
def choose_experts_backend(device: torch.device, dtype: torch.dtype, requested: str = "auto") -> str:
    """As :func:`choose_backend` for the experts' products: ``auto`` takes ``cute`` where it is installed and can run.

    :func:`default_backends`, or MOESCALE_EXPERTS in the environment, says what ``auto`` is instead.
    """
    if requested == "auto":
        requested = _asked_for("experts")
    if requested not in ("auto", "cute"):
        return choose_backend(device, dtype, requested)
    if _takes_cute("experts", requested, objection_to_cute("experts", device, dtype)):
        return "cute"
    return choose_backend(device, dtype)


@torch.compiler.assume_constant_result
def choose_attention_backend(
    device: torch.device,
    dtype: torch.dtype,
    widths: tuple[int, int],
    requested: str = "auto",
    *,
    documents: bool = False,
    features: tuple[AttentionFeature, ...] = (),
) -> str:
    """Return the backend of attention with ``widths`` of key and value: ``cute``, ``triton`` or ``torch``.

    ``features`` are what is asked for beyond causality and ``documents``. ``auto`` takes ``cute`` where it is
    installed, can run and is not slower; then, for documents, windows and sinks, and for grouped queries in
    fp32, ``triton``; otherwise the best kernel that PyTorch has.
    :func:`default_backends`, or MOESCALE_ATTENTION in the environment, says what ``auto`` is instead.
    """
    if requested == "auto":
        requested = _asked_for("attention")
    if requested not in get_args(AttentionBackend):
        names = ", ".join(get_args(AttentionBackend))
        raise KernelInputError(f"attention's back end ({requested!r}) must be one of {names}")
    if requested == "torch":
        return "torch"
    if requested == "triton":
        _checked_request(device, dtype, "triton")
        objection = objection_to_triton_attention(dtype, widths)
        if objection is not None:
            raise KernelInputError(f"kernels.backend ('triton') {objection}, or use 'auto'")
        return "triton"
    objection = objection_to_cute("attention", device, dtype)
    if objection is None and widths not in CUTE_ATTENTION_WIDTHS:
        known = ", ".join(map(str, CUTE_ATTENTION_WIDTHS))
        objection = f"takes keys and values of widths {known}, not {widths}; take a model with such"
    # PyTorch's kernels for half precision share heads of the keys; its fp32 kernel repeats them, and builds [S, S].
    takes_torch = not documents and (not features or features == ("grouped queries",) and dtype.itemsize == 2)
    # In windows Triton is faster (benchmarks/results/h200/family_attention.json).
    is_slower = (takes_torch and widths in CUDNN_FASTER_WIDTHS) or "windows" in features
    if requested == "cute" or not is_slower:
        if _takes_cute("attention", requested, objection):
            return "cute"
    if takes_torch:
        return "torch"
    runs = choose_backend(device, dtype) == "triton" and objection_to_triton_attention(dtype, widths) is None
    return "triton" if runs else "torch"


def objection_to_triton_attention(dtype: torch.dtype, widths: tuple[int, int]) -> str | None:
    """Return why attention's Triton kernels cannot take such operands, and the remedy; None where they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes bf16, fp16 and fp32 in attention, not {dtype}; use one of them"
    width, v_width = widths
    if attention_parts(width) is None or attention_parts(v_width) != (v_width, 0):
        return (
            f"takes keys whose width is a power of two from 16 to {MAX_ATTENTION_WIDTH} or the sum of two of them, and "
            f"values whose width is such a power, not {widths}; take a model with such"
        )
    return None


def attention_parts(width: int) -> tuple[int, int] | None:
    """Return the two powers of two that ``width`` is the sum of, the second one 0 for a power; None if it is neither.

    Each part is at least 16, the least that a GPU's matrix unit takes.
    """
    large = 1 << max(0, width.bit_length() - 1)
    rest = width - large
    if width < 16 or width > MAX_ATTENTION_WIDTH or rest & (rest - 1) or 0 < rest < 16:
        return None
    return large, rest


def _takes_cute(part: CutePart, requested: str, objection: str | None) -> bool:
    if requested == "cute" and objection:
        raise KernelInputError(f"kernels.backend ('cute') {objection}, or use 'auto'")
    return requested == "cute" or (objection is None and cute_usable(part))


def _checked_request(device: torch.device, dtype: torch.dtype, requested: str) -> str:
    if requested not in BACKENDS:
        raise KernelInputError(
            f"kernels.backend ({requested!r}) must be one of auto, {', '.join(BACKENDS)}{nearest(requested, BACKENDS)}"
        )
    if requested != "triton":
        return requested
    if not triton_available():
        raise KernelInputError(
            "kernels.backend ('triton') needs the package triton, which is not installed; use 'auto'"
        )
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            raise KernelInputError(
                f"kernels.backend ('triton') needs CUDA capability {MINIMUM_CAPABILITY} or newer; {device} has "
                f"{capability}; use 'auto'"
            )
    elif not (triton_interpreted() and device.type == "cpu"):
        raise KernelInputError(
            f"kernels.backend ('triton') cannot run on {device} ({dtype}): it needs a CUDA device, or the interpreter "
            "(TRITON_INTERPRET=1) on the CPU; use 'auto'"
        )
    return requested


def objection_to_cute(part: CutePart, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the back end ``cute`` cannot run there, and the remedy; None where nothing speaks against it."""
    if device.type != "cuda":  # before looking for packages, which nobody needs there
        return f"needs a Hopper GPU, CUDA capability {HOPPER}; {device} is no CUDA device; take one"
    if not cute_available(part):
        return (
            f"needs the packages triton and {CUTE_PACKAGES[part][1]}, which are not both installed; install them by "
            "pip install 'moescale[cute]'"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability != HOPPER:
        return f"needs a Hopper GPU, CUDA capability {HOPPER}; {device} has {capability}; take one"
    if dtype != torch.bfloat16:
        return f"computes in torch.bfloat16 only, not in {dtype}; use that"
    return None


def check_shape(operator: str, name: str, tensor: torch.Tensor, shape: Sequence[int | None], meaning: str) -> None:
    """Refuse ``tensor`` unless its shape is ``shape`` (None: any length), naming both and what they mean."""
    actual = tuple(tensor.shape)
    if len(actual) != len(shape) or any(s is not None and s != a for s, a in zip(shape, actual, strict=True)):
        expected = tuple("any" if s is None else s for s in shape)
        raise KernelInputError(f"{operator}: {name} has shape {actual}; it must be {meaning} = {expected}")


def check_dtype(operator: str, name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Refuse ``tensor`` unless its dtype is one of ``allowed``."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise KernelInputError(f"{operator}: {name} has dtype {tensor.dtype}; it must be {names}")


def check_device(operator: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Refuse ``tensor`` unless it lives on ``device``."""
    if tensor.device != device:
        raise KernelInputError(f"{operator}: {name} is on {tensor.device}; the other inputs are on {device}")


def check_gradient_buffer(operator: str, name: str, weight: torch.Tensor, buffer: torch.Tensor) -> None:
    """Refuse ``buffer`` unless a backward can add the gradient of ``weight`` to it: its shape, its dtype or fp32."""
    full_name = f"{name}_gradient"
    check_shape(operator, full_name, buffer, tuple(weight.shape), f"the shape of {name}")
    check_dtype(operator, full_name, buffer, (weight.dtype, torch.float32))
    check_device(operator, full_name, buffer, weight.device)
    if not buffer.is_contiguous() or buffer.requires_grad:
        raise KernelInputError(f"{operator}: {full_name} must be contiguous and not require a gradient itself")
