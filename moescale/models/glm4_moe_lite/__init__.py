"""GLM-4.7-Flash's architecture: latent attention with wide heads and DeepSeek-V3's routing.

As a computation it is DeepSeek-V3 (arXiv:2412.19437). Its config.json says otherwise which layers are dense.
"""

from moescale.models.family import Family
from moescale.models.glm4_moe_lite import hf
from moescale.models.latent import operators
from moescale.models.latent.hf import NAMES
from moescale.models.layer_operators import OUTSIDE

FAMILY = Family(
    model_type="glm4_moe_lite",
    read_hf=hf.read_hf,
    hf_fields=hf.RULES.known,
    write_hf=hf.write_hf,
    transformers_differences=hf.transformers_differences,
    names=NAMES,
    layers=operators.layers,
    outside=OUTSIDE,
    dims=operators.dims,
    biases=operators.biases,
    builder="moescale.models.latent.model:build",
)
