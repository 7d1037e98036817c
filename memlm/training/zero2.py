"""DeepSpeed's ZeRO-2: gradients and moments of AdamW in shards, weights whole on every process.

After Rajbhandari et al. 2020, arXiv 1910.02054, section 5.2. Every process keeps the moments and,
once they are reduced, the gradients of an equal part of all weights, updates that part, and gathers
the rest.

accelerate is not told of DeepSpeed: its own way makes the step inside of the backward pass, before
anyone knows the norm of the gradient, and casts the weights. Processes, devices and autocast are
those of DDP, and the engine is built and driven here. deepspeed is imported by runs that were
launched with it alone.
"""

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch import distributed as dist

from memlm.config import TrainConfig
from memlm.errors import UserError
from memlm.training.fully_sharded import blocks_of
from memlm.training.loss import RowLoss

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # numbers that are reduced, and gathered, at a time
_ASKED = "ACCELERATE_USE_DEEPSPEED"
_SETTING = "ACCELERATE_DEEPSPEED_"
_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,  # of no meaning here: losses come with their weights
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,  # rows of tables count in the norm, so it is done by the trainer
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": sys.maxsize,
    "zero_optimization": {
        "stage": 2,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    },
}


def is_asked() -> bool:
    """Whether the run was launched with DeepSpeed."""
    return os.environ.get(_ASKED, "false").lower() == "true"


def is_engine(row_loss: nn.Module) -> bool:
    """Whether a loss module is DeepSpeed's engine around one."""
    return "deepspeed" in sys.modules and isinstance(
        row_loss, sys.modules["deepspeed"].DeepSpeedEngine
    )


@contextlib.contextmanager
def unknown_to_accelerate() -> Iterator[None]:
    """While active, an `Accelerator` is built as for DDP."""
    names = [name for name in os.environ if name == _ASKED or name.startswith(_SETTING)]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def check(options: TrainConfig, processes: int) -> None:
    """Raise UserError unless a run that was launched with DeepSpeed can be made.

    Args:
        options: what is trained.
        processes: that take part.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError('deepspeed is not installed: pip install "memlm[deepspeed]"')
    _check_launch()
    if processes == 1:
        raise UserError("DeepSpeed ZeRO-2 shares a model among processes, but there is only one")
    if options.optimizer != "adamw":
        raise UserError(
            f"train.optimizer: {options.optimizer} does not work under DeepSpeed ZeRO-2, which "
            "cuts parameters at any place; use adamw, or launch with DDP or FSDP2"
        )
    if options.memory_parallel > 1:
        raise UserError(
            "train.memory_parallel: tables in parts do not work under DeepSpeed ZeRO-2; leave it "
            "at 1, or launch with DDP or FSDP2"
        )
    if options.reinit_keys_after is not None:
        raise UserError(
            "train.reinit_keys_after: does not work under DeepSpeed ZeRO-2, whose shards keep "
            "weights of their own; leave it out (null), or launch with DDP"
        )
    if options.backprop == "replay":
        raise UserError(
            "train.backprop: replay does not work under DeepSpeed ZeRO-2; use truncated, or launch "
            "with DDP or FSDP2"
        )
    if options.compile:
        raise UserError(
            "train.compile: does not work under DeepSpeed ZeRO-2; leave it out (false), or launch "
            "with DDP or FSDP2"
        )


def _check_launch() -> None:
    """Refuse settings of the launch config that would be passed over."""
    stage = os.environ.get(f"{_SETTING}ZERO_STAGE", "2")
    if stage != "2":
        raise UserError(
            f"zero_stage: {stage} is not supported; launch with zero_stage: 2, as in "
            "configs/accelerate/deepspeed_zero2.yaml, or with configs/accelerate/fsdp2.yaml"
        )
    for name in ("offload_optimizer_device", "offload_param_device"):
        device = os.environ.get(f"{_SETTING}{name.upper()}", "none")
        if device != "none":
            raise UserError(f"{name}: {device} is not supported; use none")
    if os.environ.get(f"{_SETTING}CONFIG_FILE", "none") != "none":
        raise UserError(
            "deepspeed_config_file: is not supported; leave it out, as in "
            "configs/accelerate/deepspeed_zero2.yaml"
        )
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping not in ("none", "auto"):
        raise UserError("gradient_clipping: is not supported; use train.clip_norm")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UserError("gradient_accumulation_steps: must be 1; use train.micro_batch_rows")


def prepare_engine(
    accelerator: Accelerator, row_loss: RowLoss, adamw: torch.optim.AdamW
) -> tuple[nn.Module, "ShardedAdamW"]:
    """The engine around a loss module, and the optimizer of its parameters; collective.

    Every process gets the weights of the main process.

    Args:
        accelerator: of the run.
        row_loss: without the tables that are updated by rows.
        adamw: of all its trainable parameters, without a state yet.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    accelerator.prepare_model(row_loss, evaluation_mode=True)  # autocast, and the device
    if row_loss.model.memories():
        _meet_in_blocks(row_loss)
    groups = [dict(group) for group in adamw.param_groups]
    engine, zero, *_ = deepspeed.initialize(model=row_loss, optimizer=adamw, config=dict(_CONFIG))
    return engine, ShardedAdamW(groups, zero)


def accumulation(
    accelerator: Accelerator, row_loss: nn.Module, last: bool
) -> contextlib.AbstractContextManager:
    """For the passes of a micro-batch: whether it is the last of its step.

    Under DDP and FSDP2 the gradients of the others stay where they are. ZeRO-2 reduces those of
    every micro-batch, and is told when they are complete.
    """
    if not is_engine(row_loss):
        return contextlib.nullcontext() if last else accelerator.no_sync(row_loss)
    row_loss.set_gradient_accumulation_boundary(last)
    return contextlib.nullcontext()


class ShardedAdamW(torch.optim.Optimizer):
    """AdamW of which every process holds the moments of its part of all parameters.

    Its groups are those of the parameters; what a process updates are its parts of them, flat, one
    for each group. `state` only holds what `take_state` is to divide.

    Args:
        groups: the groups before DeepSpeed made its own of them.
        zero: DeepSpeed's optimizer.
    """

    def __init__(self, groups: list[dict[str, Any]], zero: Any):
        super().__init__(groups, {})
        self.zero = zero
        self.adamw: torch.optim.AdamW = zero.optimizer
        # Left to the first step, DeepSpeed would know those of the first group alone.
        for _, flat in self._parts():
            self.adamw.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                **{name: torch.zeros_like(flat) for name in MOMENTS},
            }
        zero._lazy_init_hp_params_optimizer_state()

    def squared_norm(self) -> float:
        """Of the gradients of all parameters; collective."""
        norm = torch.nn.utils.get_total_norm(self._gradients())
        square = norm.to(device=self.zero.device, dtype=torch.float64).square()
        dist.all_reduce(square)
        return float(square)

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients of all parameters."""
        if gradients := self._gradients():
            torch._foreach_mul_(gradients, factor)

    def _gradients(self) -> list[Tensor]:
        """This process's part of them, once they are reduced."""
        return [part for parts in self.zero.averaged_gradients.values() for part in parts]

    def step(self, closure: None = None) -> None:
        """Update this process's part of the parameters and gather the others; collective."""
        for ours, theirs in zip(self.param_groups, self.adamw.param_groups, strict=True):
            theirs["lr"] = ours["lr"]
        self.zero.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, also those of a step that was not made."""
        self.zero.zero_grad()
        for gradients in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
            for number in gradients:
                gradients[number] = None

    def take_weights(self) -> None:
        """Go on from the weights that the model has been given."""
        self.zero.refresh_fp32_params()

    def whole_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """The whole moments on the CPU by parameter, on the main process alone; collective.

        As AdamW's own state; a group's parameters all have its number of steps.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[Tensor, dict[str, Tensor]] = {}
        for group, flat in self._parts():
            step = self.adamw.state[flat]["step"].detach().cpu()
            for parameter in group["params"]:
                found = {"step": step.clone()}
                for name in MOMENTS:
                    whole = safe_get_full_optimizer_state(parameter, name)
                    if dist.get_rank() == 0:
                        found[name] = whole.cpu()
                if dist.get_rank() == 0:
                    state[parameter] = found
        return state

    def take_state(self) -> None:
        """Keep this process's part of `state`, which is then empty.

        A group goes on from the most steps of its parameters: AdamW on one process counts none for
        a parameter in a step that never reached it.
        """
        from deepspeed.utils import safe_set_full_optimizer_state

        for group, flat in self._parts():
            held = [self.state[one] for one in group["params"] if one in self.state]
            step = max((float(entries["step"]) for entries in held), default=0.0)
            self.adamw.state[flat]["step"].fill_(step)
        for parameter, entries in self.state.items():
            for name in MOMENTS:
                safe_set_full_optimizer_state(parameter, entries[name].to(parameter.device), name)
        self.state.clear()

    def _parts(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Every group and this process's part of it."""
        for ours, theirs in zip(self.param_groups, self.adamw.param_groups, strict=True):
            (flat,) = theirs["params"]
            yield ours, flat


class _Meet(torch.autograd.Function):
    """Hands on its input; in the backward pass a parameter gets a gradient of zeros here."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.parameter.new_zeros(()).expand_as(ctx.parameter)


def _meet_in_blocks(row_loss: RowLoss) -> None:
    """Let the gradients of a block's parameters be complete at its input, one after the other.

    DeepSpeed reduces gradients in the order in which they become complete, which has to be the same
    on all processes. Where the rows of one never reach a memory, its parameters had no gradient
    there. Those outside of blocks have theirs from the first block's input on.
    """
    blocks = blocks_of(row_loss.model)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = [one for one in row_loss.parameters() if id(one) not in inside]
    for block in blocks:
        met = [one for one in [*block.parameters(), *outside] if one.requires_grad]
        outside = []

        def meet(block: nn.Module, inputs: tuple[Any, ...], met: list[Tensor] = met) -> Any:
            hidden, *others = inputs
            if torch.is_grad_enabled():
                for parameter in met:
                    hidden = _Meet.apply(hidden, parameter)
            return hidden, *others

        block.register_forward_pre_hook(meet)
