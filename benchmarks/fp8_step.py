"""The whole 16B model on one GPU with GEMMs in fp8, beside bf16, each by the plan that `moescale compile` finds for it.

    python benchmarks/fp8_step.py --cluster h200 --output benchmarks/results/h200/step-fp8.json

Random weights of the public configuration, text, no setting beyond precision, the sequence length and the tokens of a
step. Copies in fp8 of all weights fit on an H200 where bf16 weights are updated with stochastic rounding, without an
exact master. So bf16 is measured twice: allowed the same, and with exact masters. Tokens/s are the mean of the steps
after two of warming up, optimizer and copies included.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from one_gpu import WARM_UP_STEPS, compile_plan, parser_of_job, prepare_corpus, run_until

from moescale.tools.measurement import describe_measurement, write_result

STOCHASTIC = ("--allow-stochastic-rounding",)
WAYS: dict[str, tuple[str, ...]] = {
    "fp8": ("--precision", "fp8", *STOCHASTIC),
    "bf16": STOCHASTIC,
    "bf16 with exact masters": (),
}


def main() -> None:
    parser = parser_of_job(__doc__, steps=10)
    parser.add_argument("--data", type=Path, help="a corpus prepared before; default: the standard library's sources")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = arguments.data or prepare_corpus(folder, arguments.sequence_length)
        for way in arguments.ways:
            plan_file = folder / f"{way}.json"
            compile_plan(plan_file, arguments, *WAYS[way])
            options = ("--model", arguments.model, "--data", corpus, "--plan", plan_file, "--initialize", "random")
            records, to_first = run_until(arguments.steps + WARM_UP_STEPS, folder / f"run {way}", *options)
            plan, measured = json.loads(plan_file.read_text()), records[WARM_UP_STEPS:]
            seconds = statistics.mean(record["step_seconds"] for record in measured)
            peak, predicted = max(record["peak_bytes"] for record in measured), plan["prediction"]
            found[way] = {
                "tokens_per_second": arguments.tokens_per_step / seconds,
                "step_seconds": seconds,
                "step_seconds_each": [record["step_seconds"] for record in measured],
                "predicted_step_seconds": predicted["step_seconds"],
                "predicted_step_error": predicted["step_seconds"] / seconds - 1,
                "peak_bytes": peak,
                "predicted_peak_bytes": predicted["allocated_bytes"],
                "predicted_peak_error": predicted["allocated_bytes"] / peak - 1,
                "seconds_from_command_to_first_step_done": to_first,
                "losses": [record["loss"] for record in measured],
                "errors_of_rounding": {key: value for key, value in records[0].items() if key.startswith("fp8_")},
                "plan": plan,
            }
    result = describe_measurement() | {
        "model": arguments.model,
        "tokens_per_second": found.get("fp8", {}).get("tokens_per_second"),
        "bf16_tokens_per_second": found.get("bf16", {}).get("tokens_per_second"),
        "exact_bf16_tokens_per_second": found.get("bf16 with exact masters", {}).get("tokens_per_second"),
        "ways": found,
    }
    for way, numbers in found.items():
        error, peak_error = numbers["predicted_step_error"], numbers["predicted_peak_error"]
        print(
            f"{way:24s} {numbers['tokens_per_second']:8.0f} tokens/s, {numbers['step_seconds']:.3f} s predicted "
            f"{error:+.1%}, {numbers['peak_bytes'] / 2**30:.2f} GiB predicted {peak_error:+.2%}"
        )
    if arguments.output:
        write_result(arguments.output, result)


if __name__ == "__main__":
    main()
