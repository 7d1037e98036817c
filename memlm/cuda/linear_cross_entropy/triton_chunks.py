"""How the backward pass of the loss is cut: full cards, in memory that is there anyway.

The logits' gradients of a chunk, and the float32 parts of its sums where few programs would have
work, lie in what is not yet written: the other gradient, or the rows of the same one behind the
chunk. Chunks are then many row tiles wide, and become narrower towards the last row.
"""

import dataclasses

from torch import Tensor

PART = 4  # tiles that a part of a sum has at least; fewer would be written down for too little


@dataclasses.dataclass(frozen=True)
class Product:
    """One of the two products, row tile by row tile.

    row_tile: rows of a tile. terms: tiles of logits that a sum goes over. columns: programs beside
    each other in a row tile. held: bytes of the logits' gradients of a row tile. sums: of its sums
    in float32. row: of a row of the result. lent: of the other result, not yet written; None = it
    is, and the rows behind a chunk lend theirs. own: bytes of its own that the pass may take.
    programs: how many fill the card.
    """

    row_tile: int
    terms: int
    columns: int
    held: int
    sums: int
    row: int
    lent: int | None
    own: int
    programs: int

    @property
    def own_bytes(self) -> int:
        """To be allocated: a row tile at least where nothing lends one."""
        return max(self.own, self.held) if (self.lent or 0) < self.held else self.own

    def chunk(self, rows: int) -> tuple[int, int]:
        """Row tiles of the next chunk, and parts of its sums; `rows` are still to be written."""
        if self.lent is None:
            most = rows * self.row // (self.held + self.row_tile * self.row)
        else:
            most = self.lent // self.held
        most = min(-(-rows // self.row_tile), max(most, self.own_bytes // self.held))
        sizes = [most >> n for n in range(most.bit_length())]
        tiles = max(sizes, key=lambda tiles: self._running(rows, tiles))  # the largest of the best
        return tiles, self._parts(rows, tiles)

    def _running(self, rows: int, tiles: int) -> int:
        """Programs of the kernel that has the fewer, as far as the card takes them."""
        products = tiles * self.columns * self._parts(rows, tiles)
        return min(self.programs, tiles * self.terms, products)

    def _parts(self, rows: int, tiles: int) -> int:
        lent = max(0, rows - tiles * self.row_tile) * self.row if self.lent is None else self.lent
        less, more = sorted((lent, self.own_bytes))
        fitting = max(less, more - tiles * self.held) // (tiles * self.sums)
        wanted = -(-self.programs // (tiles * self.columns))
        return max(1, min(fitting, wanted, self.terms // PART))

    def places(
        self, lent: Tensor, own: Tensor, tiles: int, parts: int, rows: int
    ) -> tuple[Tensor, Tensor]:
        """Memory for the logits' gradients and the sums of a chunk of `rows`; all uint8 [bytes].

        The sums' is empty if there is one part.
        """
        less, more = sorted((lent, own), key=len)
        held, rest = more[: tiles * self.held], more[tiles * self.held :]
        size = parts * rows * (self.sums // self.row_tile) if parts > 1 else 0
        return held, max(rest, less, key=len)[:size]
