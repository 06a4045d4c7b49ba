"""OLMoE (arXiv:2409.02060): queries and keys normed over all heads at once, many experts, none shared.

``hf`` is its Hugging Face folder, ``operators`` what the planner sees, ``model`` the module, which alone imports torch.
"""

from moescale.models.family import Family
from moescale.models.olmoe import hf, operators

FAMILY = Family(
    model_type="olmoe",
    read_hf=hf.read_hf,
    hf_fields=hf.RULES.known,
    write_hf=hf.write_hf,
    transformers_differences=hf.transformers_differences,
    names=hf.NAMES,
    layers=operators.layers,
    outside=operators.outside,
    dims=operators.dims,
    biases=operators.biases,
    builder="moescale.models.olmoe.model:build",
)
