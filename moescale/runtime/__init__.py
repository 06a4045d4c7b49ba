"""The training run: plan -> torch.distributed engine, optimizer, checkpoints, train loop, calibration.

May import: moescale.report, moescale.convert, moescale.models and below. The only layer that imports torch.distributed.
"""
