"""How many pairs of a key and a value the state of a memory holds, by its rules alone.

Nothing is trained: random pairs are written one after another through the memory's own operation,
then every key is asked again.
"""
