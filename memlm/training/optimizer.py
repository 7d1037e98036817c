"""Which optimizer updates which parameter."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from memlm.config import TrainConfig
from memlm.errors import UserError
from memlm.memory import ProductKey, ValueTable
from memlm.training.row_optimizer import RowOptimizer
from memlm.training.spam import Spam

# Smallest side of a matrix that Muon updates: projections to one number per head are gates.
MUON_LEAST_SIDE = 16
NO_DECAY_NAMES = ("A_log", "dt_bias")
# Of a table's rows, the share that a step touches from which updating all of them costs no more.
WHOLE_TABLE_COVERAGE = 0.75


def parameter_groups(model: nn.Module) -> dict[str, list[str]]:
    """Names of the trainable parameters by how they are updated.

    matrices: weights of hidden linear layers with both sides of at least 16.
    values: value tables, the parameters of modules with `is_value_table` set.
    no_decay: vectors and scalars (norms, biases, gates), decay rates, and whatever carries
        `_no_weight_decay`.
    others: embeddings, head, convolutions, keys, experts and small matrices.
    """
    groups: dict[str, list[str]] = {"matrices": [], "values": [], "no_decay": [], "others": []}
    # A tied head is not listed again: parameters are visited once, under their first name.
    ends = {id(layer.weight) for layer in _ends(model)}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            full_name = f"{module_name}.{name}" if module_name else name
            groups[_group(module, name, parameter, ends)].append(full_name)
    return groups


def _ends(model: nn.Module) -> list[nn.Module]:
    """The embedding and the head."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [layer for layer in ends if layer is not None]


def _group(module: nn.Module, name: str, parameter: Tensor, ends: set[int]) -> str:
    if getattr(module, "is_value_table", False):
        return "values"
    exempt = name in NO_DECAY_NAMES or getattr(parameter, "_no_weight_decay", False)
    if parameter.ndim < 2 or exempt:
        return "no_decay"
    hidden = isinstance(module, nn.Linear) and id(parameter) not in ends
    return "matrices" if hidden and min(parameter.shape) >= MUON_LEAST_SIDE else "others"


@dataclasses.dataclass(frozen=True)
class TableUpdate:
    """How a value table is updated, and why.

    Attributes:
        name: of the table in the model.
        table: the table.
        method: "adam", "lazy_adam" or "rowwise_adagrad".
        reason: in words, for the log.
    """

    name: str
    table: ValueTable
    method: str
    reason: str


def table_updates(model: nn.Module, config: TrainConfig) -> list[TableUpdate]:
    """How each value table of a model is updated.

    Raises:
        UserError: for an optimizer that tables which several processes hold together cannot have.
    """
    per_token = table_reads(model)
    updates = []
    for name, table in model.named_modules():
        if not isinstance(table, ValueTable) or not table.weight.requires_grad:
            continue
        rows, reads = len(table.weight), sum(per_token[table]) * config.tokens_per_step
        covered = -math.expm1(-reads / rows)  # of the rows, were they read at random
        method, why = config.value_optimizer, "as configured"
        if table.sharding is not None:
            if method == "adam":
                raise UserError(
                    "train.value_optimizer: adam updates whole tables, but train.memory_parallel "
                    "shares them; use lazy_adam or rowwise_adagrad"
                )
            method, why = {"auto": "lazy_adam"}.get(method, method), "the table is shared"
        elif method == "auto":
            whole = covered >= WHOLE_TABLE_COVERAGE
            method = "adam" if whole else "lazy_adam"
            why = "updating all rows costs no more" if whole else "the others are left alone"
        touched = f"{reads:,} reads a step touch up to {covered:.0%} of {rows:,} rows"
        updates.append(TableUpdate(name, table, method, f"{touched}; {why}"))
    return updates


def table_reads(model: nn.Module) -> dict[ValueTable, list[int]]:
    """Rows that a token reads of each table, by layer."""
    shared = {
        name: module
        for owner in model.modules()
        if isinstance(getattr(owner, "shared", None), nn.ModuleDict)
        for name, module in owner.shared.items()
    }
    reads: dict[ValueTable, list[int]] = {}
    for memory in model.modules():
        if isinstance(memory, ProductKey):
            config = memory.config
            owner = memory.values if config.share is None else shared[config.share]
            for table in owner.modules():
                if isinstance(table, ValueTable):
                    reads.setdefault(table, []).append(config.num_heads * config.top_k)
    return reads


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW or SPAM over all parameters, or Muon over the matrices and AdamW over the rest.

    Every parameter group keeps its rate in `base_lr`; groups with `constant` ignore the schedule.
    Muon is torch.optim.Muon (Jordan et al., 2024). AdamW is fused: one pass over each parameter,
    on a GPU and on a CPU. Value tables learn at their own constant rate
    without decay, as in Lample et al., 2019 and Berges et al., 2024; those of which a step reads
    few rows have a `RowOptimizer` (see `table_updates`).
    """
    parameters = dict(model.named_parameters())
    named = parameter_groups(model)

    def group(names: list[str], rate: float, decay: float, constant: bool = False) -> dict:
        return {
            "params": [parameters[name] for name in names],
            "lr": rate,
            "base_lr": rate,
            "weight_decay": decay,
            "constant": constant,
        }

    by_rows: dict[str, list[ValueTable]] = {}
    for update in table_updates(model, config):
        if update.method != "adam":
            by_rows.setdefault(update.method, []).append(update.table)
            named["values"].remove(f"{update.name}.weight")
    decayed = named["others"]
    if config.optimizer != "muon":
        decayed = named["matrices"] + decayed
    groups = [
        group(decayed, config.learning_rate, config.weight_decay),
        group(named["no_decay"], config.learning_rate, 0.0),
    ]
    values = [group(named["values"], config.value_learning_rate, 0.0, constant=True)]
    spam, adamw = (groups, values) if config.optimizer == "spam" else ([], groups + values)
    spam, adamw = ([item for item in part if item["params"]] for part in (spam, adamw))
    optimizers: list[torch.optim.Optimizer] = []
    if spam:
        optimizers.append(
            Spam(
                spam,
                betas=config.betas,
                threshold=config.spam_threshold,
                reset_every=config.spam_reset_every,
                warmup_steps=config.spam_warmup_steps,
            )
        )
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, betas=config.betas, fused=True))
    if config.optimizer == "muon" and named["matrices"]:
        matrices = group(named["matrices"], config.muon_learning_rate, config.weight_decay)
        optimizers.append(torch.optim.Muon([matrices]))
    for method, tables in by_rows.items():
        rate = config.value_learning_rate
        rows = RowOptimizer(tables, rate, method, config.betas)
        for item in rows.param_groups:
            item.update(base_lr=rate, constant=True)
        optimizers.append(rows)
    return optimizers


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Scale the rate of every scheduled group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (1.0 if group["constant"] else factor)
