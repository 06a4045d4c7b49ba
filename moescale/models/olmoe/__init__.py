"""OLMoE (arXiv:2409.02060): queries and keys normed over all heads at once, many experts, none shared.

``hf`` is its config.json, ``operators`` what the planner sees, ``model`` the module, which alone imports torch.
"""

from moescale.models.family import Family
from moescale.models.grouped import hf as grouped_hf
from moescale.models.grouped.operators import grouped_dims
from moescale.models.layer_operators import OUTSIDE
from moescale.models.olmoe import hf, operators

FAMILY = Family(
    model_type="olmoe",
    read_hf=hf.read_hf,
    hf_fields=hf.RULES.known,
    write_hf=hf.write_hf,
    transformers_differences=grouped_hf.transformers_differences,
    names=grouped_hf.NAMES,
    layers=operators.layers,
    outside=OUTSIDE,
    dims=grouped_dims,
    builder="moescale.models.olmoe.model:build",
)
