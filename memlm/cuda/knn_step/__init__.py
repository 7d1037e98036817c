"""One token per row of the kNN cache in decoding on a CPU: its search, and its attention.

At the sizes of small models every torch operation takes as long as another, and the two are some
sixty. Elsewhere `memlm.memory.knn_retrieval` and `memlm.memory.knn_cache` do the same in torch.
"""
