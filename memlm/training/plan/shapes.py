"""Running a model without computing anything: tensors that have only a shape, and their bytes."""

import contextlib
import importlib.util
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

SMALL = 1 << 20  # numbers of the largest tensor that is computed
_aten = torch.ops.aten
_EMPTY = (
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
)
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


class ShapesOfFloats(TorchDispatchMode):
    """Computes what follows from tokens and positions alone; everything else has only a shape.

    Which path a layer takes depends on where the documents of a row lie, small tensors of integers,
    and these are real. What a parameter takes part in is a FakeTensor of torch. Where a path
    depends on such numbers, each expert gets as many tokens as the others, every token finds what
    it searches, and no two scores are equal.

    Attributes:
        live: bytes of the tensors that were made under the mode and are there, each storage once.
        peak: the most that were there at a time.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = self.peak = 0
        self._storages = WeakIdKeyDictionary()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Count neither these tensors nor their views, which are made later."""
        self._storages.update((tensor.untyped_storage(), None) for tensor in tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        shapes_alone = any(isinstance(x, FakeTensor) for x in tensors)
        if shapes_alone and func is _aten._local_scalar_dense.default:
            return 0
        if shapes_alone and func is _aten.bincount.default:
            found = _equal_counts(*args, **kwargs)
        elif shapes_alone and func is _aten.nonzero.default:
            found = args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        elif shapes_alone or _is_large(tensors, args):
            if func in _INDEXING:
                args = (args[0], _all_places(args[1]), *args[2:])
            with self.fake:
                found = func(*args, **kwargs)
        else:
            found = func(*args, **kwargs)
            if func in _EMPTY:  # kernels that are not launched write nothing into it
                found.zero_()
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._storages:
            self._storages[storage] = None
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size


def _is_large(tensors: list[Tensor], args: tuple) -> bool:
    """Whether an operation on these real tensors, or on none, gives more than is computed."""
    if tensors:
        try:
            shape = torch.broadcast_shapes(*(x.shape for x in tensors))
        except RuntimeError:  # not an operation of each number with each
            shape = max((x.shape for x in tensors), key=math.prod)
        return math.prod(shape) > SMALL
    sizes = args[0] if args and isinstance(args[0], list | tuple) else args
    return math.prod(size for size in sizes if isinstance(size, int)) > SMALL


def _equal_counts(chosen: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    share, rest = divmod(chosen.numel(), minlength)
    return torch.full((minlength,), share) + (torch.arange(minlength) < rest)


def _all_places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices in place of masks; one that has only a shape chooses everything."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        elif isinstance(index, FakeTensor):
            found += [index.new_empty(index.numel(), dtype=torch.int64)] * index.ndim
        else:
            found += index.nonzero().unbind(1)
    return found


def eager_where_possible(operation: str, refusals: Mapping[str, str | None]) -> str:
    """Chooses what plain torch does."""
    return "eager" if "eager" in refusals else "reference"


def as_on_a_gpu(operation: str, refusals: Mapping[str, str | None]) -> str:
    """Chooses the Triton kernels wherever there are any."""
    if refusals.get("triton", "none") is None and has_kernels():
        return "triton"
    return eager_where_possible(operation, refusals)


def has_kernels() -> bool:
    """Whether Triton is there; its launchers say what kernels keep."""
    return importlib.util.find_spec("triton") is not None


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Triton launches nothing: the tensors have only a shape. Searches look at nothing again."""
    if not has_kernels():
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from memlm.cuda.topk_search import triton_search

    kinds = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}
    for kind in kinds:
        kind.run = lambda *_, **__: None
    repair, triton_search.repair = triton_search.repair, _first_results
    try:
        yield
    finally:
        triton_search.repair = repair
        for kind, run in kinds.items():
            kind.run = run


def _first_results(best: Tensor, limit: Tensor, asked: Any, store: Any, tiles: Any, k: int):
    """What `triton_repair.repair` gives where no lane is doubtful: here the entry 0, k times."""
    from memlm.cuda.topk_search.triton_repair import LAST

    found = best.topk(min(k, best.shape[-1])).values
    return found.new_full((*found.shape[:-1], k), LAST)
