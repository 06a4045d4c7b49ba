"""One AdamW update of 2^30 bf16 weights in every state format, on one GPU: time and memory traffic.

python benchmarks/adamw.py
"""

from __future__ import annotations

import itertools
import json

import torch

from moescale.kernels.adamw import AdamWHyperparameters, adamw_update, init_adamw_state

ROWS, COLUMNS = 2**19, 2048
BYTES = {"fp32": 8, "bf16": 4, "int8": 2 + 8 / 128}
MASTER_BYTES = {"fp32": 4, "bf16_remainder": 2, "stochastic_bf16": 0}


def main() -> None:
    rows = []
    hyperparameters = AdamWHyperparameters(
        learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, num_updates=10
    )
    for moments, master in itertools.product(BYTES, MASTER_BYTES):
        parameter = torch.randn(ROWS, COLUMNS, device="cuda", dtype=torch.bfloat16)
        gradient = torch.randn_like(parameter)
        state = init_adamw_state(parameter, moments, master)
        scale = torch.ones((), device="cuda")
        times = []
        for seed in range(6):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            adamw_update(parameter, gradient, state, hyperparameters, gradient_scale=scale, seed=seed)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        milliseconds = sorted(times[1:])[2]
        traffic = parameter.numel() * (2 * 2 + 2 + 2 * BYTES[moments] + 2 * MASTER_BYTES[master])
        rows.append(
            {
                "moments": moments,
                "master": master,
                "milliseconds": round(milliseconds, 3),
                "terabytes_per_second": round(traffic / milliseconds / 1e9, 2),
                "bytes_per_weight": traffic / parameter.numel(),
            }
        )
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
