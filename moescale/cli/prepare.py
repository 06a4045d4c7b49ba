"""``moescale prepare``: tokenise text and pack it into sequences."""

from __future__ import annotations

import json as json_module
from typing import Annotated

from cyclopts import Parameter

from moescale.data.prepare import PrepareSettings, prepare
from moescale.errors import say


def prepare_command(settings: Annotated[PrepareSettings, Parameter(name="*")], *, json: bool = False) -> None:
    """Tokenise text and pack it into sequences, once; a second call with the same input does nothing.

    Parameters
    ----------
    json
        Print the report as JSON on standard output, without a progress bar.
    """
    report = prepare(settings, progress=not json)
    if json:
        say(json_module.dumps(report.to_dict(), indent=2))
    else:
        say(report.to_text())
