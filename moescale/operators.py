"""Every operator's annotation: its named dimensions, once, for planner and runtime alike. Imports no torch."""
