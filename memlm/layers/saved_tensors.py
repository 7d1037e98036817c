"""What autograd saves for the backward pass, kept in the CPU's memory until it is asked for.

After Rajbhandari et al. 2021, "ZeRO-Infinity", arXiv 2104.07857, section 5.2.2: activations leave
the device while later blocks run, and come back in reverse order, a block before they are used.
"""

import collections
import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST = 2**16  # bytes; what is smaller takes longer to send than to compute again
# Blocks whose tensors are still on the device: the one that runs, and the one that is being sent.
_BLOCKS_ON_DEVICE = 2


class SavedOnHost:
    """Sends what blocks save for their backward passes to the CPU's memory, and brings it back.

    Whole storages are sent, each once however many tensors and blocks save a view of it; what comes
    back has the same values, strides and offsets. Parameters, buffers, tensors of fewer than
    `smallest` bytes, subclasses of Tensor and tensors of other devices stay where they are. As
    without, a tensor that is changed in place before its backward pass is an error, unless it was
    on the CPU by then.

    On a GPU a stream of its own copies into pinned memory while later blocks run; the computing
    stream waits for it two blocks later and only then gives the memory free, so at most two blocks
    have theirs on the device. Backward passes bring back a block by a second stream while the block
    behind it computes. On a CPU both are plain copies.

    Attributes:
        sent_bytes: bytes that were copied to the CPU's memory so far.

    Args:
        smallest: bytes of a storage from which on it is sent.
    """

    def __init__(self, smallest: int = SMALLEST):
        self.smallest = smallest
        self.sent_bytes = 0
        self._stored: weakref.WeakValueDictionary[tuple[int, int], _Stored] = (
            weakref.WeakValueDictionary()
        )
        self._on_device: collections.deque[weakref.ref[_Block]] = collections.deque()
        self._copies: dict[torch.device, _PlainCopies] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of the CPU's memory that wait for a backward pass."""
        return sum(stored.host.nbytes for stored in list(self._stored.values()))

    @contextlib.contextmanager
    def block(self, device: torch.device, stay: Iterable[Tensor] = ()) -> Iterator[None]:
        """While it lasts, what is saved goes to the CPU's memory.

        Args:
            device: whose tensors are sent.
            stay: tensors that live on anyway, such as parameters; asked for where the first tensor
                is saved.
        """
        while len(self._on_device) >= _BLOCKS_ON_DEVICE:
            block = self._on_device.popleft()()
            if block is not None:
                block.leave_device()
        previous = self._on_device[-1]() if self._on_device else None
        block, staying = _Block(previous), None

        def pack(tensor: Tensor) -> "_Kept | _Sent":
            nonlocal staying
            # The output of a node leads to the node: kept there, neither would ever be freed.
            tensor = tensor if tensor.grad_fn is None else tensor.detach()
            storage = None
            if type(tensor) is Tensor and tensor.device == device and _is_plain(tensor):
                storage = tensor.untyped_storage()
            if storage is None or storage.nbytes() < self.smallest:
                return _Kept(tensor, tensor._version)
            if staying is None:
                staying = {one.untyped_storage()._cdata for one in stay}
            if storage._cdata in staying:
                return _Kept(tensor, tensor._version)
            key = (storage._cdata, tensor._version)
            stored = self._stored.get(key)
            if stored is None:
                stored = self._stored[key] = _Stored(tensor, self._copies_of(device))
                if not block.stored:
                    self._on_device.append(weakref.ref(block))
                block.stored.append(weakref.ref(stored))
                self.sent_bytes += stored.host.nbytes
            place = (tensor.storage_offset(), tensor.size(), tensor.stride())
            return _Sent(stored, block, tensor.dtype, *place)

        with saved_tensors_hooks(pack, _unpack):
            yield

    def _copies_of(self, device: torch.device) -> "_PlainCopies":
        if device not in self._copies:
            kind = _PlainCopies if device.type == "cpu" else _StreamedCopies
            self._copies[device] = kind(device)
        return self._copies[device]


class _Kept(NamedTuple):
    """A tensor that stays, and how often it had been changed in place."""

    tensor: Tensor
    version: int


class _Sent(NamedTuple):
    """A view of a storage that was sent, and the block that saved the view."""

    stored: "_Stored"
    block: "_Block"
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


def _unpack(saved: _Kept | _Sent) -> Tensor:
    if isinstance(saved, _Kept):
        _check_version(saved.tensor, saved.version)
        return saved.tensor
    saved.block.bring()
    storage = saved.stored.storage()
    empty = torch.empty(0, dtype=saved.dtype, device=storage.device)
    return empty.set_(storage, saved.offset, saved.size, saved.stride)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_conj() and not tensor.is_neg()


def _check_version(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a {tensor.dtype} tensor of shape {list(tensor.shape)} is at version "
            f"{tensor._version}; expected version {version} instead"
        )


class _Block:
    """What one block saved: the storages that it was the first to save, in that order.

    Args:
        previous: the block before, which the backward pass reaches after this one.
    """

    def __init__(self, previous: "_Block | None"):
        self.stored: list[weakref.ref[_Stored]] = []
        self.previous = None if previous is None else weakref.ref(previous)
        self._wanted = False

    def leave_device(self) -> None:
        """Give the device's memory free, once all is on the CPU."""
        for stored in self._living():
            stored.leave_device()

    def bring(self) -> None:
        """Have everything, and that of the block before, brought back."""
        if self._wanted:
            return
        self._wanted = True
        self._bring_own()
        previous = None if self.previous is None else self.previous()
        if previous is not None:
            previous._bring_own()

    def _bring_own(self) -> None:
        for stored in reversed(self._living()):
            stored.bring()

    def _living(self) -> list["_Stored"]:
        found = [reference() for reference in self.stored]
        return [stored for stored in found if stored is not None]


class _Stored:
    """A storage in the CPU's memory; it lives as long as autograd keeps a tensor of it.

    Args:
        tensor: a view of it.
        copies: how it is copied.
    """

    def __init__(self, tensor: Tensor, copies: "_PlainCopies"):
        storage = tensor.untyped_storage()
        # As long as it is referred to, no other storage gets its address.
        self.reference = StorageWeakRef(storage)
        self.copies = copies
        self.host, self._sent = copies.send(_bytes(storage))
        self._source, self._version = tensor, tensor._version
        self._returned: Tensor | None = None
        self._arrived: Any = None

    def leave_device(self) -> None:
        """Let go of the storage on the device, which a change in place would make wrong before."""
        if self._source is not None and self._source._version == self._version:
            self.copies.wait(self._sent)
            self._source = None

    def bring(self) -> None:
        """Start the copy back, unless the storage is on the device."""
        if self._source is None and self._returned is None:
            self._returned, self._arrived = self.copies.bring(self.host, self._sent)

    def storage(self) -> torch.UntypedStorage:
        """The storage on the device."""
        if self._source is not None:
            _check_version(self._source, self._version)
            return self._source.untyped_storage()
        self.bring()
        self._wait()
        return self._returned.untyped_storage()

    def _wait(self) -> None:
        arrived, self._arrived = self._arrived, None
        if arrived is not None:
            self.copies.wait(arrived)

    def __del__(self):
        # What was brought and never asked for: its memory is free once it has arrived.
        if getattr(self, "_arrived", None) is not None:
            self._wait()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return flat.set_(storage, 0, (storage.nbytes(),), (1,))


class _PlainCopies:
    """Copies on a CPU, which are made when the call returns."""

    def __init__(self, device: torch.device):
        self.device = device

    def send(self, flat: Tensor) -> tuple[Tensor, Any]:
        """A copy in the CPU's memory, and what to wait for before it is read."""
        return flat.clone(), None

    def bring(self, host: Tensor, sent: Any) -> tuple[Tensor, Any]:
        """A copy on the device of what was sent, and what to wait for before it is read."""
        return host.clone(), None

    def wait(self, event: Any) -> None:
        """Let what is computed from now on begin after an event."""


class _StreamedCopies(_PlainCopies):
    """Copies by streams of their own, one for each direction, beside the computing stream.

    All memory of the device is taken and given free in the order of the computing stream, which
    waits for a copy before it gives its source free, and before it reads its result. A copy waits
    for what was computed before it was asked for. No allocation needs `record_stream`, whose memory
    would come free at a time that depends on how far the CPU runs ahead.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def send(self, flat: Tensor) -> tuple[Tensor, Any]:
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._out):
            host.copy_(flat, non_blocking=True)
        return host, self._out.record_event()

    def bring(self, host: Tensor, sent: Any) -> tuple[Tensor, Any]:
        returned = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        # Whoever had this memory before may still be computing.
        self._back.wait_stream(torch.cuda.current_stream(self.device))
        self._back.wait_event(sent)
        with torch.cuda.stream(self._back):
            returned.copy_(host, non_blocking=True)
        return returned, self._back.record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)
