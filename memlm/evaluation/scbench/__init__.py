"""SCBench: conversations about one long context (Li et al., 2024, arXiv:2412.10319)."""
