"""Attention of one query per row in decoding on a CPU: softmax(scale q K^T) V over all keys seen.

At the sizes of small models every torch operation takes as long as another, so that the rotation,
the writing of the key and the attention are one call here. Elsewhere `memlm.layers.attention` does
the same in torch.
"""
