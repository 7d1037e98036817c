"""Where a program finds its tokens among sequences of lengths the host does not know.

Sequence n of a packed call owns the slots from ``cu_seqlens[n] // size + n`` on; uniform calls
number the slots row by row.
"""

import triton
import triton.language as tl


@triton.jit
def locate_slot(slot, T, sequences, size, cu_seqlens):
    """Sequence, its first token and length, and the position in it where the slot begins."""
    if cu_seqlens is not None:
        low = slot * 0
        high = low + sequences - 1
        while low < high:  # the last sequence whose slots begin at or before this one
            middle = (low + high + 1) // 2
            first = (tl.load(cu_seqlens + middle).to(tl.int64) // size).to(tl.int32) + middle
            before = first <= slot
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle - 1)
        n = low
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1).to(tl.int64) - start).to(tl.int32)
        position = (slot - n - (start // size).to(tl.int32)) * size
    else:
        slots = tl.cdiv(T, size)
        n = slot // slots
        start = n.to(tl.int64) * T
        length = T
        position = (slot % slots) * size
    return n, start, length, position
