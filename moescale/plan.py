"""ParallelPlan: the only thing the planner hands to the runtime. Imports no torch."""
