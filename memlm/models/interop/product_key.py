"""Product-key memories that were trained with other codes.

Meta's memory layers (Berges et al. 2024, arXiv 2412.09764), XLM (Lample et al. 2019,
arXiv 1907.05242) and lucidrains' product-key-memory.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from memlm.errors import UserError, nearest
from memlm.memory import ProductKey, ProductKeyConfig

Layout = Literal["meta", "xlm", "lucidrains"]
StateDict = dict[str, Tensor]

QUERY_MLP = "query_proj.query_mlps.0.weight"  # Meta and XLM
PROJECTIONS = ("value_proj", "swilu_projection")  # Meta
TO_QUERIES = "to_queries.weight"  # lucidrains
# Names of tables, and what they are called within our table.
VALUES = {"values.weight": "weight"}
EXPERTS = {"values_u.weight": "down.weight", "values_v.weight": "up.weight"}


@dataclasses.dataclass(frozen=True)
class ProductKeyWeights:
    """Weights of product-key memories, in the order of their layers.

    Tables are those of the source, not copies.

    Attributes:
        layout: whose names and shapes the source has.
        hidden_size: channels of a token.
        configs: of `ProductKey`, by the name of the memory in the source. Memories that use one
            table have the same `share`.
        layers: state dicts of `ProductKey`, by the same names.
        shared: state dicts of the tables that several memories use, by `share`.
    """

    layout: Layout
    hidden_size: int
    configs: dict[str, ProductKeyConfig]
    layers: dict[str, StateDict]
    shared: dict[str, StateDict]

    def modules(self) -> tuple[dict[str, ProductKey], nn.ModuleDict]:
        """The memories, and the tables that they find in `CallContext.shared`."""
        with torch.device("meta"):
            memories = {
                name: ProductKey(config, self.hidden_size) for name, config in self.configs.items()
            }
            shared = nn.ModuleDict(
                {
                    config.share: ProductKey.build_shared(config, self.hidden_size)
                    for config in self.configs.values()
                    if config.share is not None
                }
            )
        for name, memory in memories.items():
            memory.load_state_dict(self.layers[name], assign=True)
        for share, table in shared.items():
            table.load_state_dict(self.shared[share], assign=True)
        return memories, shared

    def state_dict(self, sites: Mapping[str, str]) -> StateDict:
        """The weights by their names in a `MemLMForCausalLM`.

        Args:
            sites: where the memories stand in the model, by their names in the source, as in
                {"layers.12.feed_forward": "12.ffn"}.

        Raises:
            UserError: for a name that the source does not have.
        """
        found = {}
        for name, site in sites.items():
            if name not in self.layers:
                valid = ", ".join(map(repr, self.layers))
                hint = nearest(name, self.layers)
                raise UserError(f"load_product_key: no memory {name!r}{hint} (valid: {valid})")
            parts = {f"model.layers.{site}.module": self.layers[name]}
            share = self.configs[name].share
            if share is not None:
                parts[f"model.shared.{share}"] = self.shared[share]
            for place, tensors in parts.items():
                found |= {f"{place}.{key}": tensor for key, tensor in tensors.items()}
        return found


def load_product_key(
    source: Mapping[str, Tensor] | str | Path, top_k: int, prefix: str = ""
) -> ProductKeyWeights:
    """Convert every product-key memory of a checkpoint; its layout is found by names and shapes.

    Settings that leave no trace in weights must be what they are by default, top_k aside: softmax
    over scores as they are (no temperature, no normalised queries, no other gates).

    Args:
        source: a state dict, a safetensors file or a folder of such files.
        top_k: slots read per head, which is not in the weights.
        prefix: only names that start with it are looked at.

    Raises:
        UserError: where a tensor is missing, has a shape that does not fit, or belongs to an
            option that `ProductKey` does not have.
    """
    tensors = {name: t for name, t in _read(source).items() if name.startswith(prefix)}
    parts = [_Part(tensors, base) for base in _bases(tensors)]
    if not parts:
        raise UserError(
            f"load_product_key: no product-key memory under {prefix!r}: it has `keys` and beside "
            f"it `{QUERY_MLP}` (Meta, XLM) or `{TO_QUERIES}` (lucidrains); {_example(tensors)}"
        )
    tables, table_of = _find_tables(parts)
    converted = [_convert(part, tables[table_of[part.base]]) for part in parts]
    first = converted[0]
    for part, one in zip(parts, converted, strict=True):
        if (one.layout, one.hidden_size) != (first.layout, first.hidden_size):
            raise UserError(
                f"load_product_key: {part.base}keys has the layout of {one.layout} for "
                f"{one.hidden_size} channels, {parts[0].base}keys that of {first.layout} for "
                f"{first.hidden_size}; load them one by one with `prefix`"
            )
        part.check_nothing_left()

    configs, layers, shared = {}, {}, {}
    users = list(table_of.values())
    for part, one in zip(parts, converted, strict=True):
        number, name = table_of[part.base], part.base.removesuffix(".")
        share = None
        if users.count(number) > 1:
            share = "table" if len(tables) == 1 else f"table_{number}"
            shared[share] = tables[number]
        configs[name] = ProductKeyConfig(**one.sizes, top_k=top_k, share=share)
        configs[name].check_sizes(one.hidden_size)
        own = {} if share else {f"values.{key}": t for key, t in tables[number].items()}
        layers[name] = one.tensors | own
    return ProductKeyWeights(first.layout, first.hidden_size, configs, layers, shared)


# --- finding ---


def _read(source: Mapping[str, Tensor] | str | Path) -> Mapping[str, Tensor]:
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix == ".safetensors" for file in files):
        raise UserError(
            f"load_product_key: {path} is no safetensors file nor a folder with some; read other "
            "files with torch.load(file, weights_only=True) and give the state dict"
        )
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _bases(tensors: Mapping[str, Tensor]) -> list[str]:
    """What the names of each memory start with, in the order of the layers."""
    found = [name.removesuffix("keys") for name in tensors if re.search(r"(^|\.)keys$", name)]
    found = [base for base in found if base + QUERY_MLP in tensors or base + TO_QUERIES in tensors]
    return sorted(found, key=_natural)


def _natural(name: str) -> list[str | int]:
    """For an order in which layer 10 comes after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _example(tensors: Mapping[str, Tensor]) -> str:
    return f"the first name there is {next(iter(tensors))!r}" if tensors else "nothing is there"


class _Part:
    """The tensors of one memory; remembers which were not taken."""

    def __init__(self, tensors: Mapping[str, Tensor], base: str):
        self.base = base
        self.tensors = {
            name.removeprefix(base): tensor
            for name, tensor in tensors.items()
            if name.startswith(base) and not name.endswith(".num_batches_tracked")
        }
        self.left = list(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name and shape."""
        if name not in self.tensors:
            raise UserError(f"load_product_key: {self.base}{name} is missing")
        tensor = self.tensors[name]
        if shape and tensor.shape != shape:
            raise self.error(name, f"it must be {list(shape)}")
        self.left.remove(name)
        return tensor

    def linear(self, name: str, ours: str, inputs: int, outputs: int) -> StateDict:
        """A linear layer with its bias, under our name."""
        return {
            f"{ours}.weight": self.take(f"{name}.weight", outputs, inputs),
            f"{ours}.bias": self.take(f"{name}.bias", outputs),
        }

    def error(self, name: str, valid: str) -> UserError:
        shape = list(self.tensors[name].shape)
        return UserError(f"load_product_key: {self.base}{name} is {shape}, {valid}")

    def check_nothing_left(self) -> None:
        if self.left:
            raise UserError(
                f"load_product_key: {self.base}{self.left[0]} belongs to an option that the "
                "product_key memory does not have"
            )


def _find_tables(parts: list[_Part]) -> tuple[list[StateDict], dict[str, int]]:
    """The different tables, and the number of the one that each memory reads.

    Codes that share a table name the same tensor in every memory, or in one of them alone.
    """
    tables: list[StateDict] = []
    table_of = {}
    for part in parts:
        names = EXPERTS if any(name in part for name in EXPERTS) else VALUES
        if names is VALUES and "values.weight" not in part:
            continue
        table = {ours: part.take(name) for name, ours in names.items()}
        for name in names:
            if part.tensors[name].ndim != 2:
                raise part.error(name, "it must be [num_keys^2, value_size]")
        number = next((i for i, other in enumerate(tables) if _same(table, other)), len(tables))
        if number == len(tables):
            tables.append(table)
        table_of[part.base] = number
    for part in parts:
        if part.base not in table_of:
            if len(tables) != 1:
                raise UserError(
                    f"load_product_key: {part.base}values.weight is missing, and {len(tables)} "
                    "other tables are there; exactly one could be shared"
                )
            table_of[part.base] = 0
    return tables, {part.base: table_of[part.base] for part in parts}


def _same(one: StateDict, other: StateDict) -> bool:
    def equal(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        identical = a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
        return identical or torch.equal(a, b)

    return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)


# --- converting ---


@dataclasses.dataclass(frozen=True)
class _Converted:
    layout: Layout
    hidden_size: int
    sizes: dict[str, int | str | bool]  # options of ProductKeyConfig
    tensors: StateDict  # of ProductKey, without the table


def _convert(part: _Part, table: StateDict) -> _Converted:
    slots, value_size = next(iter(table.values())).shape
    num_keys = math.isqrt(slots)
    if num_keys**2 != slots:
        raise UserError(
            f"load_product_key: the table of {part.base}keys has {slots} rows, it must have "
            "num_keys^2"
        )
    convert = _convert_query_mlp if QUERY_MLP in part else _convert_lucidrains
    return convert(part, table, num_keys, value_size)


def _convert_query_mlp(part: _Part, table: StateDict, n: int, value_size: int) -> _Converted:
    """Meta and XLM: a linear layer makes the queries [heads, 2, key_size / 2]."""
    query, keys = part.take(QUERY_MLP), part.take("keys")
    half = keys.shape[-1]
    if query.ndim != 2 or len(query) % (2 * half):
        raise part.error(
            QUERY_MLP, f"it must be [heads * {2 * half}, hidden_size]: keys have {half} channels"
        )
    width, hidden = query.shape
    heads = width // (2 * half)
    layout: Layout = "meta"
    if keys.shape == (heads, 2, n, half):
        layout = "xlm"
    elif keys.shape == (n, half):  # XLM with the same keys for all heads and halves
        layout, keys = "xlm", keys.expand(heads, 2, n, half)
    elif keys.shape != (2 * heads * n, half):
        raise part.error(
            "keys",
            f"it must be {[2 * heads * n, half]} (Meta) or {[heads, 2, n, half]} (XLM) for "
            f"{heads} heads and {n}^2 slots",
        )
    for name, tensor in part.tensors.items():
        if re.fullmatch(r"query_proj\.query_mlps\.[1-9]\d*\.weight", name) and tensor.ndim != 1:
            raise part.error(name, "but queries must come from a single linear layer")

    bias = "query_proj.query_mlps.0.bias"
    tensors = {
        "query_proj.weight": query,
        "query_proj.bias": part.take(bias, width) if bias in part else query.new_zeros(width),
        "keys": keys.reshape(heads, 2, n, half).contiguous(),
    }
    sizes = _sizes(n, heads, 2 * half, value_size)
    sizes["query_norm"] = "none"
    if "query_proj.query_mlps.1.weight" in part:
        sizes["query_norm"] = "batch"
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"query_norm.{name}"] = part.take(f"query_proj.query_mlps.1.{name}", width)

    if table.keys() == set(EXPERTS.values()):
        sizes["variant"] = "peer"
        # Meta's experts have the projections too, but do not use them.
        part.left = [name for name in part.left if name.split(".")[0] not in PROJECTIONS]
    elif "swilu_projection.weight" in part:
        sizes["variant"] = "memory_plus"
        tensors |= part.linear("swilu_projection", "gate_proj", hidden, value_size)
        tensors |= part.linear("value_proj", "o_proj", value_size, hidden)
    elif value_size != hidden:
        tensors |= part.linear("value_proj", "o_proj", value_size, hidden)
    if "gating.weight" in part:
        sizes["gated"] = True
        tensors |= part.linear("gating", "scalar_gate", hidden, 1)
    return _Converted(layout, hidden, sizes, tensors)


def _convert_lucidrains(part: _Part, table: StateDict, n: int, value_size: int) -> _Converted:
    """Queries [2, heads, half], one layer norm for all of them, keys [heads, n, 2, half]."""
    keys = part.take("keys")
    if keys.ndim != 4 or keys.shape[1:3] != (n, 2):
        raise part.error("keys", f"it must be [heads, {n}, 2, dim_head] for {n}^2 slots")
    heads, half = keys.shape[0], keys.shape[3]
    query = part.take(TO_QUERIES)
    if query.shape != (2 * heads * half, value_size):
        raise part.error(TO_QUERIES, f"it must be {[2 * heads * half, value_size]}")
    tensors = {
        "query_proj.weight": query.unflatten(0, (2, heads, half)).transpose(0, 1).flatten(0, 2),
        "query_proj.bias": query.new_zeros(len(query)),
        "query_norm.weight": part.take("norm.weight", half),
        "query_norm.bias": part.take("norm.bias", half),
        "keys": keys.transpose(1, 2).contiguous(),
    }
    sizes = _sizes(n, heads, 2 * half, value_size) | {"query_norm": "layer"}
    return _Converted("lucidrains", value_size, sizes, tensors)


def _sizes(num_keys: int, num_heads: int, key_size: int, value_size: int) -> dict[str, int | str]:
    return {
        "num_keys": num_keys,
        "num_heads": num_heads,
        "key_size": key_size,
        "value_size": value_size,
        "variant": "plain",
    }
