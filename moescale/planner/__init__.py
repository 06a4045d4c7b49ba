"""Workload counts, cost models, search and explanation. Imports no torch; hands a ParallelPlan to the runtime.

May import: moescale.operators, moescale.plan, moescale.config, moescale.errors, moescale.report.style.
"""
