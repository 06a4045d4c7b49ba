"""``moescale run``: train a model by a plan."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated

from cyclopts import Parameter

from moescale.api.train import LocalRanksError, train
from moescale.api.train_request import RunInputs, TrainRequest
from moescale.errors import say
from moescale.report.metrics import to_json
from moescale.runtime.join import is_first_process
from moescale.runtime.settings import TrainSettings


def run_command(
    inputs: Annotated[RunInputs, Parameter(name="*")],
    settings: Annotated[TrainSettings, Parameter(name="*")] = TrainSettings(),  # noqa: B008 - frozen
    *,
    json: bool = False,
) -> None:
    """Train a model: start it, or continue the run in the output folder.

    Parameters
    ----------
    json
        Print the summary as JSON on standard output, without a progress bar.
    """
    request = TrainRequest(**vars(inputs), settings=settings)
    if json:
        request = replace(request, observers=tuple(name for name in request.observers if name != "progress_bar"))
    try:
        summary = train(request)
    except LocalRanksError as error:  # the processes have printed the reason
        raise SystemExit(error.exit_status) from None
    if json and is_first_process():
        say(to_json(asdict(summary), indent=2))
