"""Weights of other architectures as weights of ours."""

from memlm.models.interop.product_key import ProductKeyWeights, load_product_key

__all__ = ["ProductKeyWeights", "load_product_key"]
