"""Opens the model, corpus, plan, device and observers of a request to train, and checks that they fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moescale.api.run_checks import check_corpus, check_devices, check_weights, choose_plan
from moescale.api.train_request import TrainRequest
from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config, resolve_model
from moescale.data.corpus import Corpus, open_corpus
from moescale.plan import ParallelPlan
from moescale.report.observer import Observer
from moescale.report.registry import make_observer
from moescale.runtime.device import choose_device
from moescale.runtime.hooks import TrainerHook


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A request with its inputs opened and checked."""

    request: TrainRequest
    folder: Path
    """Folder of the model."""
    config: ModelConfig
    corpus: Corpus
    plan: ParallelPlan
    device: torch.device
    observers: Sequence[Observer]
    own_observers: Sequence[Observer]
    """Those of ``observers`` that were passed as objects, so that no other process can make them."""
    hooks: Sequence[TrainerHook]


def open_run(request: TrainRequest, observers: Sequence[Observer], hooks: Sequence[TrainerHook]) -> OpenRun:
    """Open and check the inputs of ``request``. Raises ConfigError or CheckpointError if they do not fit together."""
    folder = resolve_model(request.model)
    config = read_model_config(folder, request.ignore_config_field)
    corpus = open_corpus(request.data)
    device = choose_device(request.device)
    plan = choose_plan(request, config, corpus, device)
    check_corpus(config, corpus, plan)
    check_weights(request, folder, plan)
    check_devices(request, plan, device)
    named = [make_observer(name) for name in request.observers]
    return OpenRun(
        request=request,
        folder=folder,
        config=config,
        corpus=corpus,
        plan=plan,
        device=device,
        observers=[*named, *observers],
        own_observers=observers,
        hooks=hooks,
    )
