"""The reference's performance table next to the planner's prediction, measurements and the machine's limit.

``published`` reads what nnScaler's example publishes (``published.toml``), ``rows`` puts the others' rows next to it,
``text`` and ``plot`` show them. May import: moescale.planner and below. Imports no torch.
"""
