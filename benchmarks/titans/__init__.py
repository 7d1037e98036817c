"""``python -m benchmarks.titans``: Titans' neural memory beside titans-pytorch's.

Both compute the same function with the same parameters; that outputs and gradients agree is
checked in the same run, before anything is timed.
"""
