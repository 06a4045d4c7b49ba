"""DeepSeek-V2 (arXiv:2405.04434): multi-head latent attention, fine-grained experts with shared ones."""

from moescale.models.deepseek_v2 import hf
from moescale.models.family import Family
from moescale.models.latent import operators
from moescale.models.latent.hf import NAMES
from moescale.models.layer_operators import OUTSIDE

FAMILY = Family(
    model_type="deepseek_v2",
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
