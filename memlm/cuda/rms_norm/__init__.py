"""RMSNorm of few numbers on a CPU, where every torch operation takes as long as another."""
