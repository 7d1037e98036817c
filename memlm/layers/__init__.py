"""What blocks and memories are made of: norms, attention, convolution, MLP, per-row state."""
