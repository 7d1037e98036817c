"""``python -m benchmarks.gated_delta``: the gated delta rule beside other implementations of it.

On the CPU the peer is transformers' torch function, on a GPU flash-linear-attention and FlashQLA.
That outputs and gradients agree is checked before anything is timed.
"""
