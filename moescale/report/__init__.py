"""What a run tells: metrics, TensorBoard scalars, HTML reports.

May import: moescale.config, moescale.errors.
"""
