"""DeepSeek-V2 (arXiv:2405.04434): multi-head latent attention, fine-grained experts with shared ones.

``hf`` is its Hugging Face folder, ``operators`` what the planner sees, ``model`` the module, which alone imports torch.
"""

from moescale.models.deepseek_v2 import hf, operators
from moescale.models.family import Family

FAMILY = Family(
    model_type="deepseek_v2",
    read_hf=hf.read_hf,
    hf_fields=frozenset(hf.FIELDS),
    write_hf=hf.write_hf,
    transformers_differences=hf.transformers_differences,
    names=hf.NAMES,
    layers=operators.layers,
    outside=operators.outside,
    dims=operators.dims,
    biases=operators.biases,
    builder="moescale.models.deepseek_v2.model:build",
)
