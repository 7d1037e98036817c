"""Saving and loading the store of a batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from memlm.cuda.topk_search import METRICS
from memlm.errors import UserError, nearest
from memlm.retrieval.manifest import (
    SHARD_BYTES,
    Content,
    as_content,
    commit,
    load_current,
    lock_for_writing,
    previous_content,
    read_shard,
    shards_of,
    write_shard,
)
from memlm.retrieval.vector_store import VectorStore

Store = TypeVar("Store", bound=VectorStore)


def save_store(
    store: VectorStore,
    folder: str | Path,
    *,
    metric: str,
    projection: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a store into a folder, in the place of the store that may be there.

    When this process dies in whatever moment, the folder holds the store before or this one.
    While it is written, disk space for both is needed.

    Args:
        store: of any device.
        folder: a folder of a store, or one that is made.
        metric: what its keys are searched with, see `memlm.cuda.topk_search`.
        projection: fingerprint (`memlm.fingerprint`) of the weights that made the keys.
        shard_bytes: bytes of one file, headers apart.

    Raises:
        UserError: for an unknown metric, for a folder that holds something else or cannot be
            written, or while another writer has it open.
    """
    check_metric(metric)
    folder, kind = Path(folder), type(store).__name__
    with lock_for_writing(folder):
        previous = previous_content(folder, kind)
        number = previous["next_shard"] if previous else 0
        shards = []
        for pieces in _shards(store.state_dict(), shard_bytes):
            shards.append(write_shard(folder, number + len(shards), pieces, 0))
        content = {
            "metric": metric,
            "projection": projection,
            "batch_size": store.batch_size,
            "capacity": store.capacity,
            "key_size": store.keys.shape[-1],
            "ring_head": store.start.tolist(),
            "written": store.written.tolist(),
            "tensors": {name: _describe(tensor) for name, tensor in store.tensors().items()},
            "next_shard": number + len(shards),
            "shards": as_content(shards),
        }
        commit(folder, kind, content)


def load_store(
    folder: str | Path,
    *,
    projection: str | None,
    metric: str | None = None,
    device: torch.device | str = "cpu",
    store_class: type[Store] = VectorStore,
) -> Store:
    """The store of a folder, every byte of it verified; its searches give what they gave.

    Args:
        folder: where `save_store` wrote it.
        projection: the fingerprint of the weights that make the queries; None = any.
        metric: what it will be searched with; None = any.
        device: where the store goes.
        store_class: the class that was saved.

    Raises:
        UserError: when this is no store of that class, projection and metric, or a file is
            missing, truncated or altered.
    """
    folder = Path(folder)
    return load_current(
        folder,
        store_class.__name__,
        lambda content: _load(folder, content, projection, metric, device, store_class),
    )


def check_metric(metric: str) -> None:
    """Raise UserError for an unknown metric."""
    if metric not in METRICS:
        raise UserError(
            f"metric {metric!r} is not one of {', '.join(METRICS)}{nearest(metric, METRICS)}"
        )


def check_owner(folder: Path, content: Content, projection: str | None, metric: str | None) -> None:
    """Raise UserError when keys were made by another projection, or for another metric."""
    if projection is not None and projection != content["projection"]:
        raise UserError(
            f"{folder}: its keys were made by other weights (projection "
            f"{content['projection'][:12]}, not {projection[:12]}), so no query of yours fits them"
        )
    if metric is not None and metric != content["metric"]:
        raise UserError(f"{folder}: made for the metric {content['metric']!r}, not for {metric!r}")


def _load(
    folder: Path,
    content: Content,
    projection: str | None,
    metric: str | None,
    device: torch.device | str,
    store_class: type[Store],
) -> Store:
    check_owner(folder, content, projection, metric)
    tensors = {
        name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device=device)
        for name, entry in content["tensors"].items()
    }
    filled = dict.fromkeys(tensors, 0)
    for shard in shards_of(content):
        for name, piece in read_shard(folder, shard, verify=True).items():
            rows = _rows(tensors[name])
            rows[filled[name] : filled[name] + len(piece)] = piece
            filled[name] += len(piece)
    try:
        return store_class.from_state_dict(tensors)
    except KeyError as error:
        raise UserError(f"{folder}: {error.args[0]}; saved by another version") from error


def _shards(tensors: dict[str, Tensor], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Pieces by name, on the CPU; a tensor continues in the next shard where one is full."""
    pieces: dict[str, Tensor] = {}
    room = shard_bytes
    for name, tensor in tensors.items():
        rows = _rows(tensor)
        start = 0
        while start < len(rows):
            fitting = room // max(rows[0].nbytes, 1)
            if fitting < 1 and pieces:
                yield pieces
                pieces, room = {}, shard_bytes
                continue
            piece = rows[start : start + max(fitting, 1)]
            pieces[name] = piece.cpu()
            room -= piece.nbytes
            start += len(piece)
    yield pieces


def _rows(tensor: Tensor) -> Tensor:
    """A contiguous tensor [B, M, ...] as [B * M, ...], one [B] as it is."""
    return tensor.flatten(0, 1) if tensor.ndim > 1 else tensor


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
