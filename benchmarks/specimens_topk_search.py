"""Configurations of `memlm.cuda.topk_search`'s kernels, as launches on meta tensors."""

import dataclasses
import itertools

import torch

from benchmarks.aot import Specimen

BFLOAT16, FLOAT16, FLOAT32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
# Tokens and keys that the same binaries must serve; the tiles of 1, 64 and 2048 tokens differ.
LONGER = {1: 5, 64: 33, 2048: 1999}


@dataclasses.dataclass(frozen=True)
class Search:
    """The k best of `stored` keys of D channels for each of `tokens` queries in every row."""

    D: int
    tokens: int = 2048
    dtype: torch.dtype = BFLOAT16
    key_dtype: torch.dtype = BFLOAT16
    metric: str = "dot"
    valid: bool = False
    causal: bool = False
    k: int = 32
    stored: int = 1 << 20
    rows: int = 1

    @property
    def name(self) -> str:
        dtypes = dict.fromkeys((self.dtype, self.key_dtype))
        words = [
            f"topk_search D{self.D} k{self.k} {self.metric} {self.tokens} tokens",
            "/".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
            "valid" if self.valid else "",
            "causal" if self.causal else "",
        ]
        return " ".join(word for word in words if word)

    def launch(self) -> None:
        from memlm.cuda.topk_search import triton_problem, triton_search

        per_key, per_query = (self.rows, self.stored), (self.rows, self.tokens)
        queries = _empty(*per_query, self.D, dtype=self.dtype)
        keys = _empty(*per_key, self.D, dtype=self.key_dtype)
        valid = _empty(*per_key, dtype=torch.bool) if self.valid else None
        scales = _empty(*per_key) if self.key_dtype == INT8 else None
        positions = None
        if self.causal:
            positions = [
                _empty(*shape, dtype=torch.int64) for shape in (per_key, per_query, per_query)
            ]
        tiles = triton_problem.Tiles.choose(self.rows, self.tokens, self.stored, self.D, self.k)
        store = triton_problem.Store.prepare(
            keys, self.metric, valid, positions, scales, tiles.block_n
        )
        reach = None if positions is None else tuple(positions[1:])
        asked = triton_problem.Queries.prepare(queries, keys.dtype, self.metric, reach)
        triton_search.launch(asked, store, tiles)


def quick() -> list[Specimen]:
    """Both kernels once."""
    return [_specimen(Search(256, metric="l2"))]


def full() -> list[Specimen]:
    """Widths, types, metrics, what hides keys, and few queries."""
    types = ((BFLOAT16, BFLOAT16), (FLOAT16, FLOAT16), (FLOAT32, FLOAT32))
    cases = [
        Search(D, tokens, *dtypes)
        for D, tokens, dtypes in itertools.product((64, 128, 256), (1, 64, 2048), types)
    ]
    mixed = (
        (BFLOAT16, INT8),
        (FLOAT32, INT8),
        (FLOAT32, BFLOAT16),
        (FLOAT32, FLOAT16),
        (FLOAT16, INT8),
        (BFLOAT16, FLOAT32),
    )
    cases += [Search(D, 2048, *dtypes) for D, dtypes in itertools.product((64, 256), mixed)]
    cases += [Search(D, tokens) for D, tokens in itertools.product((16, 96, 100, 768), (1, 2048))]
    cases += [
        Search(D, tokens, *dtypes, metric="cosine", valid=True, causal=True)
        for D, tokens, dtypes in itertools.product((64, 256), (1, 64, 2048), types)
    ]
    cases += [Search(64, metric="l2", causal=True), Search(256, valid=True)]
    cases += [Search(100, 2048, FLOAT32, FLOAT32, "l2", valid=True, causal=True)]
    return [_specimen(case) for case in cases]


def _specimen(case: Search) -> Specimen:
    longer = dataclasses.replace(case, tokens=LONGER[case.tokens], stored=(1 << 20) + 77, rows=3)
    products = case.tokens > 16
    return Specimen(
        case.name, case.launch, longer.launch, frozenset({"lanes_kernel"} if products else ())
    )


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
