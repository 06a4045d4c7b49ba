"""moescale: compile, run and export parallel training of DeepSeek-V2-family mixture-of-experts models.

Shape legend, used in shape comments and docstrings across the package:

    B batch (sequences)      S sequence length       T tokens = B * S        H hidden size
    N attention heads        E routed experts        K experts per token     R routed rows = T * K
    F expert intermediate    V vocabulary

Glossary: an *axis* belongs to a device mesh (pp, dp_replicate, dp_shard, cp, tp, ep), a *dim* to a tensor. A *scale
unit* is the set of plan GPUs that holds one full copy of the weights. A *micro-batch* is what one device runs forward
and backward at once; a *step* is one optimizer update over ``tokens_per_step`` tokens.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescale.api.compile import compile
    from moescale.api.compile_settings import CompileSettings
    from moescale.api.export import ExportSettings, export
    from moescale.api.train import train
    from moescale.api.train_request import TrainRequest
    from moescale.data.prepare import PrepareSettings, prepare
    from moescale.report.observer import Observer, RunContext
    from moescale.runtime.hooks import TrainerHook
    from moescale.runtime.settings import TrainSettings

__version__ = "0.1.0"

_MODULES = {
    "CompileSettings": "moescale.api.compile_settings",
    "compile": "moescale.api.compile",
    "ExportSettings": "moescale.api.export",
    "export": "moescale.api.export",
    "Observer": "moescale.report.observer",
    "PrepareSettings": "moescale.data.prepare",
    "prepare": "moescale.data.prepare",
    "RunContext": "moescale.report.observer",
    "TrainerHook": "moescale.runtime.hooks",
    "TrainRequest": "moescale.api.train_request",
    "TrainSettings": "moescale.runtime.settings",
    "train": "moescale.api.train",
}
"""Where each public name is. Imported when it is used: ``import moescale`` imports no torch, nor does ``compile``."""

__all__ = [
    "CompileSettings",
    "ExportSettings",
    "Observer",
    "PrepareSettings",
    "RunContext",
    "TrainRequest",
    "TrainSettings",
    "TrainerHook",
    "compile",
    "export",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'moescale' has no attribute {name!r}")
    if name != "compile":
        from moescale.environment import prefer_expandable_segments

        prefer_expandable_segments()  # before torch is imported
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
