"""gpt-oss (model card, arXiv:2508.10925): grouped-query attention with sinks and windows, experts with biases.

``hf`` is its Hugging Face folder, ``operators`` what the planner sees, ``model`` the module, which alone imports torch.
"""

from moescale.models.family import Family
from moescale.models.gpt_oss import hf, operators
from moescale.models.grouped import hf as grouped_hf
from moescale.models.layer_operators import OUTSIDE

FAMILY = Family(
    model_type="gpt_oss",
    read_hf=hf.read_hf,
    hf_fields=hf.RULES.known,
    write_hf=hf.write_hf,
    transformers_differences=grouped_hf.transformers_differences,
    names=hf.NAMES,
    layers=operators.layers,
    outside=OUTSIDE,
    dims=operators.dims,
    biases=operators.biases,
    builder="moescale.models.gpt_oss.model:build",
)
