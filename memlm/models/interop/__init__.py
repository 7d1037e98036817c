"""Models and weights of other architectures as ours, and ours as theirs."""

from memlm.models.interop.architecture import Architecture
from memlm.models.interop.gated_deltanet import GATED_DELTANET
from memlm.models.interop.llama import LLAMA
from memlm.models.interop.mistral import MISTRAL
from memlm.models.interop.olmo_hybrid import OLMO_HYBRID
from memlm.models.interop.product_key import ProductKeyWeights, load_product_key
from memlm.models.interop.qwen3 import QWEN3
from memlm.models.interop.qwen3_5 import QWEN3_5, QWEN3_5_MOE, QWEN3_5_MOE_TEXT, QWEN3_5_TEXT
from memlm.models.interop.qwen3_next import QWEN3_NEXT
from memlm.models.interop.retnet import RETNET

# By the `model_type` of their config.json.
ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        GATED_DELTANET,
        LLAMA,
        MISTRAL,
        OLMO_HYBRID,
        QWEN3,
        QWEN3_5,
        QWEN3_5_MOE,
        QWEN3_5_MOE_TEXT,
        QWEN3_5_TEXT,
        QWEN3_NEXT,
        RETNET,
    )
}

__all__ = ["ARCHITECTURES", "ProductKeyWeights", "load_product_key"]
