"""Configurations of `memlm.cuda.product_key_select`'s kernels, as launches on meta tensors."""

import dataclasses
import itertools

import torch

from benchmarks.aot import Specimen

BFLOAT16, FLOAT16, FLOAT32 = (
    2 * (dtype,) for dtype in (torch.bfloat16, torch.float16, torch.float32)
)
LONGER = {64: 3, 2048: 1999, 8192: 9999}  # tokens that the same binaries must serve


@dataclasses.dataclass(frozen=True)
class Select:
    """The k best of n * n slots for every token and head; half: channels of a half key."""

    k: int
    n: int
    half: int
    query_dtype: torch.dtype = torch.bfloat16
    key_dtype: torch.dtype = torch.bfloat16
    tokens: int = 8192
    heads: int = 4
    gradients: bool = False

    @property
    def name(self) -> str:
        dtypes = dict.fromkeys((self.query_dtype, self.key_dtype))
        words = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        sizes = f"k{self.k} n{self.n} D{self.half} {self.tokens} tokens"
        gradients = " with gradients" if self.gradients else ""
        return f"product_key {sizes} {'/'.join(words)}{gradients}"

    def launch(self) -> None:
        from memlm.cuda.product_key import triton_select

        query = torch.empty(
            self.tokens, self.heads, 2, self.half, dtype=self.query_dtype, device="meta"
        )
        keys = torch.empty(self.heads, 2, self.n, self.half, dtype=self.key_dtype, device="meta")
        indices, weights = triton_select.forward(query, keys, self.k)
        if self.gradients:
            triton_select.backward(query, keys, indices, weights)


def quick() -> list[Specimen]:
    """Every kernel once: many tokens, and few in float32."""
    return [_specimen(Select(32, 1024, 256)), _specimen(Select(32, 1024, 256, *FLOAT32, tokens=64))]


def full() -> list[Specimen]:
    """Sizes and types; many tokens, fewer, and so few that lists are cut into chunks."""
    types = (BFLOAT16, FLOAT32)
    sizes = ((8, 128), (16, 512), (32, 1024), (64, 2048))
    cases = [
        Select(*size, half, *dtypes, gradients=True)
        for size, half, dtypes in itertools.product(sizes, (32, 256), types)
    ]
    cases += [Select(32, 1024, 256, torch.float32), Select(32, 1024, 256, *FLOAT16)]
    cases += [Select(k, 1000, 100, *FLOAT32) for k in (1, 5, 48)]
    cases += [
        Select(k, 1024, 256, *dtypes, tokens=tokens)
        for k, dtypes, tokens in itertools.product((1, 32, 64), types, (64, 2048))
    ]
    return [_specimen(case) for case in cases]


def _specimen(case: Select) -> Specimen:
    longer = dataclasses.replace(case, tokens=LONGER[case.tokens])
    wgmma = frozenset({"halves_kernel"} if case.tokens == 8192 else ())
    return Specimen(case.name, case.launch, longer.launch, wgmma)
