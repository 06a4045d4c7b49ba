"""moescale: compile, run and export parallel training of DeepSeek-V2-family mixture-of-experts models.

Shape legend, used in shape comments and docstrings across the package:

    B batch (sequences)      S sequence length       T tokens = B * S        H hidden size
    N attention heads        E routed experts        K experts per token     R routed rows = T * K
    F expert intermediate    V vocabulary

Glossary: an *axis* belongs to a device mesh (pp, dp_replicate, dp_shard, cp, tp, ep), a *dim* to a tensor. A *scale
unit* is the set of plan GPUs that holds one full copy of the weights. A *micro-batch* is what one device runs forward
and backward at once; a *step* is one optimizer update over ``tokens_per_step`` tokens.
"""

__version__ = "0.1.0"
