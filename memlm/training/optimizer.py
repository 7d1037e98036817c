"""Which optimizer updates which parameter."""

import torch
from torch import Tensor, nn

from memlm.config import TrainConfig

# Smallest side of a matrix that Muon updates: projections to one number per head are gates.
MUON_LEAST_SIDE = 16
NO_DECAY_NAMES = ("A_log", "dt_bias")


def parameter_groups(model: nn.Module) -> dict[str, list[str]]:
    """Names of the trainable parameters by how they are updated.

    matrices: weights of hidden linear layers with both sides of at least 16.
    values: value tables, the parameters of modules with `is_value_table` set.
    no_decay: vectors and scalars (norms, biases, gates), decay rates, and whatever carries
        `_no_weight_decay`.
    others: embeddings, head, convolutions, keys and small matrices.
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


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW over all parameters, or Muon over the matrices and AdamW over the rest.

    Every parameter group keeps its rate in `base_lr`; groups with `constant` ignore the schedule.
    Muon is torch.optim.Muon (Jordan et al., 2024). Value tables learn at their own constant rate
    without decay, as in Lample et al., 2019 and Berges et al., 2024.
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

    decayed = named["others"]
    if config.optimizer == "adamw":
        decayed = named["matrices"] + decayed
    adamw = [
        group(decayed, config.learning_rate, config.weight_decay),
        group(named["no_decay"], config.learning_rate, 0.0),
        group(named["values"], config.value_learning_rate, 0.0, constant=True),
    ]
    adamw = [item for item in adamw if item["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, betas=config.betas))
    if config.optimizer == "muon" and named["matrices"]:
        matrices = group(named["matrices"], config.muon_learning_rate, config.weight_decay)
        optimizers.append(torch.optim.Muon([matrices]))
    return optimizers


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Scale the rate of every scheduled group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (1.0 if group["constant"] else factor)
