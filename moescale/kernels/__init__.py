"""Operators of the model, a folder each. Tensors in, tensors out.

In a folder, ``__init__`` has the operator itself with its checks, autograd and registration, ``reference`` its
definition in plain torch, and ``triton`` and ``cute`` the kernels, which are imported where they run. Files named
``..._triton`` hold parts of an operator's kernels. ``linear`` has no kernel of ours and is one file; ``backends``
chooses what runs, and ``rows`` serves the element-wise kernels.

May import: torch, triton, moescale.config, moescale.errors, moescale.formats, moescale.plan. Never a layer above.
"""
