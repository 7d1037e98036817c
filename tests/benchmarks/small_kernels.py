"""A kernel and its launcher, for the tests of `benchmarks.aot`; run as a program it prints them.

The program runs without TRITON_INTERPRET, which the tests themselves are under.
"""

import dataclasses
import json
import sys

import torch
import triton
import triton.language as tl

from benchmarks import aot
from memlm.cuda.dispatch import capability


@triton.jit(do_not_specialize=["length"])
def product_kernel(a, b, out, missing, length, step, scale, C: tl.constexpr):
    rows = tl.arange(0, C)
    block = rows[:, None] * C + rows[None, :]
    total = tl.dot(tl.load(a + block), tl.load(b + block)) * scale
    if missing is not None:
        total += tl.load(missing + block)
    tl.store(out + block * step, total, mask=(block < length))


def launch(C: int = 64, length: int = 1, step: int = 16, options: dict | None = None) -> None:
    a, b = (torch.empty(C, C, dtype=torch.bfloat16, device="meta") for _ in range(2))
    out = torch.empty(C, C, device="meta")
    product_kernel[(1,)](a, b, out, None, length, step, 0.5, C=C, **(options or {}))


def specimens() -> list[aot.Specimen]:
    def twice():
        launch(options={"num_warps": 4, "num_stages": 1})
        launch(options={"num_warps": 4, "num_stages": 1}, length=10**10)

    wgmma = frozenset({"product_kernel"})
    return [
        aot.Specimen("ordinary", twice, wgmma=wgmma),
        aot.Specimen("too large", lambda: launch(C=256, options={"num_warps": 8})),
        aot.Specimen("no power of two", lambda: launch(C=24)),
    ]


def by_card():
    launch(options={"num_warps": 8 if capability(torch.device("meta")) == 100 else 4})


def described(length: int, step: int) -> dict:
    with aot.recorded_launches(90) as launches:
        launch(length=length, step=step, options={"num_warps": 8, "maxnreg": 128})
    (recorded,) = launches
    return {
        "signature": recorded.signature,
        "constants": {str(path): value for path, value in recorded.constants.items()},
        "divisible": [path[0] for path, found in recorded.attributes.items() if found],
        "options": {name: recorded.options[name] for name in ("num_warps", "maxnreg", "arch")},
        "key": recorded.key,
    }


if __name__ == "__main__":
    distinct = aot.distinct_launches(specimens()[:1], (80, 90))
    compiled = aot.compile_table(specimens, (90,), processes=1)
    longer = aot.Specimen("longer", launch, lambda: launch(length=16))
    stepping = aot.Specimen("stepping", launch, lambda: launch(step=17))
    cards = aot.distinct_launches([aot.Specimen("by card", by_card)])
    found = {
        "warps": {launch.capability: launch.options["num_warps"] for _, launch, _ in cards},
        "recompiled": [aot.recompiled(longer), aot.recompiled(stepping)],
        "one": described(1, 1),
        "sixteen": described(16, 16),
        "seventeen": described(17, 17),
        "distinct": [(specimen.name, launch.capability) for specimen, launch, _ in distinct],
        "compiled": [dataclasses.asdict(one) | {"faults": one.faults(True)} for one in compiled],
    }
    json.dump(found, sys.stdout)
