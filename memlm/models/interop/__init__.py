"""Models and weights of other architectures as ours, and ours as theirs."""

from memlm.models.interop.architecture import Architecture
from memlm.models.interop.gated_deltanet import GATED_DELTANET
from memlm.models.interop.llama import LLAMA
from memlm.models.interop.mistral import MISTRAL
from memlm.models.interop.product_key import ProductKeyWeights, load_product_key
from memlm.models.interop.qwen3 import QWEN3

# By the `model_type` of their config.json.
ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        GATED_DELTANET,
        LLAMA,
        MISTRAL,
        QWEN3,
    )
}

__all__ = ["ARCHITECTURES", "ProductKeyWeights", "load_product_key"]
