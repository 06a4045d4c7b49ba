"""``moescale compile``: plan training for a cluster, and explain the plan."""

from __future__ import annotations

import json as json_module
import sys
from typing import Annotated

from cyclopts import Parameter

from moescale.api.compile_settings import CompileSettings
from moescale.errors import printable, say


def compile_command(
    settings: Annotated[CompileSettings, Parameter(name="*")], *, fit: bool = False, json: bool = False
) -> None:
    """Plan training: will it fit, how fast, with which settings, and why.

    Parameters
    ----------
    fit
        Instead of one plan: the fewest GPUs on which it fits, and tokens/s from there to 1024 GPUs.
    json
        Print the plan (or with --fit the table) as JSON on standard output.
    """
    from moescale.api.compile import compile as compile_settings  # imported here to keep --help fast
    from moescale.api.compile import corpus_notice
    from moescale.api.compile import fit as fit_settings
    from moescale.planner.explain import explain_json, explain_text
    from moescale.planner.fit import fit_json, fit_text

    notice = corpus_notice(settings)
    if notice is not None:
        say(printable(f"warning: {notice}"), sys.stderr)
    if fit:
        answer = fit_settings(settings)
        say(json_module.dumps(fit_json(answer), indent=2) if json else fit_text(answer))
        return
    result = compile_settings(settings)
    say(json_module.dumps(explain_json(result), indent=2) if json else explain_text(result))
    result.plan()  # raises if no plan fits, after the explanation of what would fit
    if settings.output is not None and not json:
        say("\n" + printable(f"plan written to {settings.output}"))
