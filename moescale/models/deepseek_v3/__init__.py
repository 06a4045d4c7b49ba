"""DeepSeek-V3 (arXiv:2412.19437), of which Moonlight is one: latent attention, experts balanced by a bias.

It differs from DeepSeek-V2 in the router: scores are sigmoids, a token's experts are chosen by score plus a bias, and
after each step the bias moves against the load (section 2.1.2).
"""

from moescale.models.deepseek_v3 import hf
from moescale.models.family import Family
from moescale.models.latent import operators
from moescale.models.latent.hf import NAMES
from moescale.models.layer_operators import OUTSIDE

FAMILY = Family(
    model_type="deepseek_v3",
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
