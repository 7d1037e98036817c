"""New memories in the blocks of a model, which goes on from its exact logits."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from memlm.errors import UserError
from memlm.layers.attention import Attention
from memlm.layers.attention_weights import AttentionWeights
from memlm.memory.base import AttendingMemory
from memlm.models.added_modules import start
from memlm.models.block import Block, Branch, build_shared
from memlm.models.configuration import MIXERS, SITES, MemLMConfig
from memlm.models.insert_config import InsertConfig
from memlm.models.modeling import MemLMForCausalLM


def insert_memory(
    model: MemLMForCausalLM,
    memory: str | Mapping[str, Any],
    layers: list[int] | None = None,
    window: int | None = None,
) -> MemLMForCausalLM:
    """Give blocks of a model a memory between mixer and feed-forward layer, in place.

    The result is the model that its new config describes, with all of its old weights. The gates of
    the new memories start at 0, so its logits are exactly those before (with a `window` those of
    texts within it). A memory reads the stream behind the mixer, or with `parallel` what the mixer
    reads; its norm starts as the norm of the site that reads the same, and with `parallel` a memory
    that can starts from the attention beside it. What asks for gradients does so as before.

    Args:
        model: also one that was converted from another architecture.
        memory: a name or `{"type": NAME, ...}`, as in `layers` of a MemLMConfig; `gate` is 0.0
            unless given.
        layers: blocks that get one, from 0; None = the upper quarter, at least one.
        window: tokens that attention sees, itself included, in every block; None = as in the model.

    Returns:
        The same model.

    Raises:
        UserError: for a memory or blocks that do not fit the model. The model is as it was then.
    """
    if not isinstance(model, MemLMForCausalLM):
        raise UserError(
            f"a {type(model).__name__} is no model of this library; load it with "
            "MemLMForCausalLM.from_pretrained, or use attach_memory"
        )
    if hasattr(model, "hf_device_map") and any(p.is_meta for p in model.parameters()):
        raise UserError(
            "weights of the model are offloaded, and new memories start from them; load it with a "
            "device for every module"
        )
    options = {"memory": memory, "layers": layers, "window": window}
    return insert(model, InsertConfig.from_mapping(options))


def insert(
    model: MemLMForCausalLM, options: InsertConfig, where: str = "insert"
) -> MemLMForCausalLM:
    """As `insert_memory`; `where` is the section of the options, for errors."""
    blocks = model.model.layers
    chosen = options.chosen_layers(len(blocks), where)
    spec = options.build_memory(where)
    _check_free(model, chosen, spec.share, where)
    attentions = {i: _attention_weights(blocks[i]) if spec.parallel else None for i in chosen}
    entries = {index: options.entry(weights) for index, weights in attentions.items()}
    config, patterns = _changed_config(model.config, entries, options.window, where)
    plans = config.plan()
    branches = {i: Branch("memory", plans[i].memory, plans[i].norm, config) for i in chosen}
    for branch in branches.values():
        if isinstance(branch.module, AttendingMemory):
            raise UserError(
                f"{where}.memory: {branch.module.name} with these options has an attention of its "
                "own, which would go on where the memory is off; choose a memory without one"
            )
    shared = build_shared(branches.values(), config.hidden_size)

    std, dtype = config.initializer_range, model.dtype
    for index, branch in branches.items():
        block = blocks[index]
        device = next(block.parameters(), model.lm_head.weight).device
        start(branch, std, device, dtype, model.training)
        _start_from(branch, block.mixer if branch.parallel else block.ffn)
        if attentions[index] is not None:
            branch.module.init_from_attention(attentions[index])
        _put(block, branch)
    start(shared, std, next(blocks[chosen[0]].parameters()).device, dtype, model.training)
    _put_shared(model, shared)
    if options.window is not None:
        _narrow(blocks, options.window)
    model.config.layers = patterns
    return model


def freeze_base(model: MemLMForCausalLM, options: InsertConfig) -> None:
    """Let nothing but the inserted memories of a model ask for gradients."""
    chosen = options.chosen_layers(len(model.model.layers))
    own = [f"model.layers.{index}.memory." for index in chosen]
    if (share := options.build_memory().share) is not None:
        own.append(f"model.shared.{share}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(own)))


def _check_free(model: MemLMForCausalLM, chosen: list[int], share: str | None, where: str) -> None:
    """Raise UserError where a block has a memory already, or others share what new ones would."""
    for index in chosen:
        branch = model.model.layers[index].memory
        if branch is not None:
            raise UserError(
                f"{where}.layers: layer {index} has a memory already ({branch.module.name})"
            )
    for name, module in model.model.memories().items():
        if share is not None and module.config.share == share:
            raise UserError(
                f"{where}.memory.share: memories of the model share {share!r} already ({name}), "
                "and what they compute has to stay; choose another name"
            )


def _changed_config(
    config: MemLMConfig, entries: dict[int, dict[str, Any]], window: int | None, where: str
) -> tuple[MemLMConfig, list[dict[str, Any]]]:
    """The config with the new memories, block by block, and its `layers` with `repeat`.

    Raises:
        UserError: for sizes that do not fit.
    """
    plans = config.plan()
    blocks = [
        {key: copy.deepcopy(value) for key, value in pattern.items() if key != "repeat"}
        for pattern in config.layers
        for _ in range(pattern.get("repeat", 1))
    ]
    for index, entry in entries.items():
        blocks[index]["memory"] = entry
    if window is not None:
        for block, plan in zip(blocks, plans, strict=True):
            if plan.mixer is not None and plan.mixer[0] in MIXERS:
                mixer = block["mixer"]
                mixer = {"type": mixer} if isinstance(mixer, str) else mixer
                own = plan.mixer[1].attention_window
                block["mixer"] = mixer | {"window": min(filter(None, (own, window)))}
    changed = copy.deepcopy(config)
    changed.layers = blocks
    try:
        changed.plan()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    patterns: list[dict[str, Any]] = []
    for block in blocks:
        if patterns and {k: v for k, v in patterns[-1].items() if k != "repeat"} == block:
            patterns[-1]["repeat"] = patterns[-1].get("repeat", 1) + 1
        else:
            patterns.append(dict(block))
    return changed, patterns


def _attention_weights(block: Block) -> AttentionWeights | None:
    """The projections of the attention at the mixer site; None where there is none."""
    attention = getattr(block.mixer, "module", None)
    if not isinstance(attention, Attention):
        return None
    layers = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    sizes = (attention.num_heads, attention.num_key_value_heads, attention.head_dim)
    return AttentionWeights(*(layer.weight.detach() for layer in layers), *sizes)


@torch.no_grad()
def _start_from(branch: Branch, neighbour: Branch | None) -> None:
    """Copy the norm of a site that reads the same stream: it knows the scale of each channel."""
    if neighbour is not None and isinstance(branch.norm, nn.RMSNorm):
        branch.norm.weight.copy_(neighbour.norm.weight)


def _put(block: Block, memory: Branch) -> None:
    """Put a memory into a block; parameters stay in the order that they have when it is loaded."""
    branches = {site: getattr(block, site) for site in SITES} | {"memory": memory}
    for site, branch in branches.items():
        delattr(block, site)
        setattr(block, site, branch)


def _put_shared(model: MemLMForCausalLM, new: nn.ModuleDict) -> None:
    """Add shared modules, in the order of the first blocks that use them."""
    modules = {**dict(model.model.shared.items()), **dict(new.items())}
    names = [memory.config.share for memory in model.model.memories().values()]
    model.model.shared = nn.ModuleDict(
        {n: modules[n] for n in dict.fromkeys(names) if n in modules}
    )


def _narrow(blocks: nn.ModuleList, window: int) -> None:
    for block in blocks:
        attention = getattr(block.mixer, "module", None)
        if isinstance(attention, Attention):
            attention.configured_window = min(filter(None, (attention.configured_window, window)))
            attention.window = min(filter(None, (attention.window, window)))
