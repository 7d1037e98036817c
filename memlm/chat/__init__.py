"""A chat in the terminal, to feel a memory: python -m memlm.chat --model FOLDER."""
