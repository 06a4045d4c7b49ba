"""Which back end an operator gets."""

from __future__ import annotations

import pytest
import torch

from moescale.kernels import backends
from moescale.kernels.backends import (
    BackendSettings,
    KernelInputError,
    choose_attention_backend,
    choose_backend,
    choose_experts_backend,
    default_backends,
    runs_triton,
)

CUDA = torch.device("cuda:0")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "capability, dtype, expected",
    [
        ((9, 0), torch.bfloat16, "triton"),
        ((8, 0), torch.float32, "triton"),
        ((7, 5), torch.bfloat16, "grouped_mm"),
        ((7, 5), torch.float32, "torch"),
    ],
)
def test_auto_takes_triton_from_ampere_on(monkeypatch, capability, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_backend(CUDA, dtype) == expected


def test_auto_does_without_triton_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "triton_available", lambda: False)
    assert choose_backend(CUDA, torch.bfloat16) == "grouped_mm"
    with pytest.raises(KernelInputError, match="needs the package triton, which is not installed; use 'auto'"):
        choose_backend(CUDA, torch.bfloat16, "triton")


def test_auto_on_the_cpu_is_plain_torch():
    assert choose_backend(CPU, torch.float32) == "torch"


def test_a_back_end_asked_for_by_name_is_used_or_refused(monkeypatch):
    assert choose_backend(CPU, torch.float32, "grouped_mm") == "grouped_mm"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend(CPU, torch.float32, "triton") == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(KernelInputError, match="'triton'. cannot run on cpu .*TRITON_INTERPRET=1"):
        choose_backend(CPU, torch.float32, "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(KernelInputError, match=r"needs CUDA capability \(8, 0\) or newer; cuda:0 has \(7, 5\)"):
        choose_backend(CUDA, torch.float32, "triton")
    with pytest.raises(
        KernelInputError, match="must be one of auto, triton, grouped_mm, torch, cute; did you mean 'torch'"
    ):
        choose_backend(CPU, torch.float32, "torhc")


def test_cute_is_refused_without_its_package_naming_what_to_install(monkeypatch):
    monkeypatch.setattr(backends, "cute_available", lambda part: False)
    with pytest.raises(KernelInputError, match=r"needs the packages .*quack-kernels.*pip install 'moescale\[cute\]'"):
        choose_experts_backend(CUDA, torch.bfloat16, "cute")


def test_cute_runs_on_hopper_in_bf16_only(monkeypatch):
    monkeypatch.setattr(backends, "cute_available", lambda part: True)
    with pytest.raises(KernelInputError, match=r"needs a Hopper GPU, CUDA capability \(9, 0\); cpu is no CUDA device"):
        choose_experts_backend(CPU, torch.bfloat16, "cute")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    with pytest.raises(KernelInputError, match=r"cuda:0 has \(10, 0\)"):
        choose_experts_backend(CUDA, torch.bfloat16, "cute")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(KernelInputError, match="computes in torch.bfloat16 only, not in torch.float32"):
        choose_experts_backend(CUDA, torch.float32, "cute")
    assert choose_experts_backend(CUDA, torch.bfloat16, "cute") == "cute"
    assert choose_backend(CUDA, torch.bfloat16, "cute") == "triton"
    assert choose_backend(CUDA, torch.bfloat16) == "triton"


@pytest.mark.parametrize(
    "installed, usable, capability, dtype, chosen",
    [
        (True, True, (9, 0), torch.bfloat16, "cute"),
        (False, True, (9, 0), torch.bfloat16, "triton"),
        (True, False, (9, 0), torch.bfloat16, "triton"),
        (True, True, (8, 0), torch.bfloat16, "triton"),
        (True, True, (9, 0), torch.float32, "triton"),
        (True, True, (7, 5), torch.bfloat16, "grouped_mm"),
    ],
)
def test_the_experts_run_in_cute_where_it_can(monkeypatch, installed, usable, capability, dtype, chosen):
    monkeypatch.setattr(backends, "cute_available", lambda part: installed)
    monkeypatch.setattr(backends, "cute_usable", lambda part: usable)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_experts_backend(CUDA, dtype) == chosen


def test_the_experts_back_end_can_be_set_from_outside(monkeypatch):
    monkeypatch.setattr(backends, "cute_available", lambda part: True)
    monkeypatch.setattr(backends, "cute_usable", lambda part: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("MOESCALE_EXPERTS", "triton")
    assert choose_experts_backend(CUDA, torch.bfloat16) == "triton"
    assert choose_experts_backend(CUDA, torch.bfloat16, "cute") == "cute"
    monkeypatch.setenv("MOESCALE_EXPERTS", "cute")
    assert choose_experts_backend(CUDA, torch.bfloat16) == "cute"
    assert choose_experts_backend(CUDA, torch.bfloat16, "triton") == "triton"
    with pytest.raises(KernelInputError, match="needs a Hopper GPU"):
        choose_experts_backend(CPU, torch.bfloat16)


def test_default_backends_say_what_auto_is_and_the_environment_overrides_them(monkeypatch):
    assert choose_experts_backend(CPU, torch.bfloat16) == "torch"
    with default_backends(BackendSettings(experts="grouped_mm", attention="cute")):
        assert choose_experts_backend(CPU, torch.bfloat16) == "grouped_mm"
        with pytest.raises(KernelInputError, match="needs a Hopper GPU"):
            choose_attention_backend(CPU, torch.bfloat16, WIDTHS)
        monkeypatch.setenv("MOESCALE_EXPERTS", "torch")
        assert choose_experts_backend(CPU, torch.bfloat16) == "torch"
        monkeypatch.delenv("MOESCALE_EXPERTS")
    assert choose_experts_backend(CPU, torch.bfloat16) == "torch"
    assert choose_attention_backend(CPU, torch.bfloat16, WIDTHS) == "torch"


def test_another_default_is_taken_by_what_is_compiled_already():
    @torch.compile(backend="eager")
    def backend(x):
        return x + (choose_experts_backend(x.device, x.dtype) == "grouped_mm")

    x = torch.zeros(1)
    assert backend(x) == 0
    with default_backends(BackendSettings(experts="grouped_mm")):
        assert backend(x) == 1
    assert backend(x) == 0


def test_the_environments_backends_are_told_of_where_they_change_something(monkeypatch):
    asked = BackendSettings(experts="triton")
    assert asked.overridden_by_environment() == (asked, [])
    monkeypatch.setenv("MOESCALE_EXPERTS", "triton")
    monkeypatch.setenv("MOESCALE_ATTENTION", "torch")
    settings, notices = asked.overridden_by_environment()
    assert settings == BackendSettings(experts="triton", attention="torch")
    assert notices == ["MOESCALE_ATTENTION=torch in the environment overrides attention_backend (auto)"]
    monkeypatch.setenv("MOESCALE_ATTENTION", "grouped_mm")
    with pytest.raises(
        KernelInputError, match=r"MOESCALE_ATTENTION \('grouped_mm'\) in the environment must be one of auto"
    ):
        asked.overridden_by_environment()


def test_a_cute_that_cannot_be_imported_is_told_of(monkeypatch):
    def broken(name):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(backends, "cute_available", lambda part: True)
    monkeypatch.setattr(backends.importlib, "import_module", broken)
    with pytest.warns(UserWarning, match=r"cannot be used \(RuntimeError: no compiler here\).*install it again"):
        assert not backends.cute_usable.__wrapped__("experts")


def test_operators_without_cute_kernels_run_triton_in_any_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert runs_triton(CUDA, torch.float32, "cute")


WIDTHS = (192, 128)


GROUPED = ("grouped queries",)
WINDOWED = ("windows", "sinks", "grouped queries")


@pytest.mark.parametrize(
    "installed, usable, capability, dtype, widths, documents, features, chosen",
    [
        (True, True, (9, 0), torch.bfloat16, WIDTHS, False, (), "cute"),
        (True, True, (9, 0), torch.bfloat16, WIDTHS, True, (), "cute"),
        (True, True, (9, 0), torch.bfloat16, (128, 128), False, GROUPED, "cute"),
        (True, True, (9, 0), torch.bfloat16, (64, 64), True, ("sinks", "grouped queries"), "cute"),
        (True, True, (9, 0), torch.bfloat16, (64, 64), True, WINDOWED, "triton"),  # faster there
        (True, True, (9, 0), torch.bfloat16, (256, 256), False, (), "torch"),  # cuDNN is faster
        (True, True, (9, 0), torch.bfloat16, (256, 256), True, (), "cute"),
        (True, True, (9, 0), torch.bfloat16, (96, 96), False, (), "torch"),  # not tested
        (False, True, (9, 0), torch.bfloat16, WIDTHS, False, (), "torch"),
        (False, True, (9, 0), torch.bfloat16, WIDTHS, True, (), "triton"),
        (False, True, (9, 0), torch.bfloat16, (128, 128), False, GROUPED, "torch"),
        (False, True, (9, 0), torch.float32, (128, 128), False, GROUPED, "triton"),  # PyTorch's would repeat the keys
        (False, True, (9, 0), torch.bfloat16, (64, 64), False, WINDOWED, "triton"),
        (True, False, (9, 0), torch.bfloat16, WIDTHS, False, (), "torch"),
        (True, True, (10, 0), torch.bfloat16, WIDTHS, False, (), "torch"),
        (True, True, (9, 0), torch.float32, WIDTHS, False, (), "torch"),
    ],
)
def test_attention_runs_in_cute_where_it_can(
    monkeypatch, installed, usable, capability, dtype, widths, documents, features, chosen
):
    monkeypatch.setattr(backends, "cute_available", lambda part: installed)
    monkeypatch.setattr(backends, "cute_usable", lambda part: usable)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_attention_backend(CUDA, dtype, widths, documents=documents, features=features) == chosen
    if (installed, usable, capability, dtype) == (True, True, (9, 0), torch.bfloat16) and widths != (96, 96):
        by_name = choose_attention_backend(CUDA, dtype, widths, "cute", documents=documents, features=features)
        assert by_name == "cute"


def test_attentions_back_end_can_be_set_from_outside(monkeypatch):
    monkeypatch.setattr(backends, "cute_available", lambda part: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("MOESCALE_ATTENTION", "torch")
    assert choose_attention_backend(CUDA, torch.bfloat16, WIDTHS) == "torch"
    assert choose_attention_backend(CUDA, torch.bfloat16, WIDTHS, "cute") == "cute"
    with pytest.raises(KernelInputError, match=r"of widths \(64, 64\), .*\(192, 128\), .*, not \(96, 64\)"):
        choose_attention_backend(CUDA, torch.bfloat16, (96, 64), "cute")
    monkeypatch.setenv("MOESCALE_ATTENTION", "flash")
    with pytest.raises(KernelInputError, match=r"back end \('flash'\) must be one of auto, torch, triton, cute"):
        choose_attention_backend(CUDA, torch.bfloat16, WIDTHS)
    monkeypatch.setattr(backends, "cute_available", lambda part: False)
    with pytest.raises(KernelInputError, match=r"needs the packages triton and flash-attn-4"):
        choose_attention_backend(CUDA, torch.bfloat16, WIDTHS, "cute")


def test_a_package_that_fails_while_it_is_looked_for_is_not_available(monkeypatch):
    def broken(name):
        raise OSError("built for another torch")

    monkeypatch.setattr(backends.importlib.util, "find_spec", broken)
    monkeypatch.setattr(backends, "triton_available", lambda: True)
    assert not backends.cute_available.__wrapped__("attention")
