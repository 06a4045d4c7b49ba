"""Training: process groups, parallelization by a plan, optimizer, checkpoints, the training loop and calibration.

May import: moescale.report, moescale.convert, moescale.models and below. Only this layer imports torch.distributed.
"""
