"""A file per mesh axis: the sizes it may have, what it divides, the communication and memory it costs.

:mod:`~moescale.planner.axes.axis` says what an axis tells the planner, :mod:`~moescale.planner.axes.registry` lists the
axes in their order. Search, cost and memory model loop over that list. Axes that this version's runtime lacks are
priced like the others; which these are is said in :mod:`moescale.plan`.
"""
