"""Linear recurrences on a CPU in C++: see native.cpp for the formulas.

The tensors are read and written where they lie, in float32.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from memlm.cuda import native
from memlm.cuda.linear_recurrence.inputs import Inputs

SOURCE = Path(__file__).with_name("native.cpp")
PARALLEL = 1 << 20  # fewer multiplications with the state than this take one thread


def refusal(inputs: Inputs) -> str | None:
    """Why these inputs are not for this implementation, or None."""
    if inputs.v.device.type != "cpu":
        return f"the tensors are on {inputs.v.device.type}, it runs on the CPU"
    if inputs.v.dtype == torch.float64:
        return "the values are float64, it computes in float32"
    return native.refusal("linear_recurrence", SOURCE)


def forward(
    inputs: Inputs, chunk_states: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Outputs, final state, chunk states (empty unless asked for), and what `backward` needs:
    see `saved_like`."""
    v = inputs.v
    o, state = _empty(inputs, v.shape), _empty(inputs, inputs.state_shape)
    chunks = _empty(inputs, (0,))
    found = {"o": o, "state": state}
    if chunk_states:
        # Slots of no sequence stay zero.
        found["chunk_states"] = chunks = _empty(inputs, inputs.chunk_states_shape).zero_()
    saved = saved_like(inputs) if save else []
    _run("memlm_forward", inputs, found | _names(inputs, saved))
    return o.to(v.dtype), state, chunks, saved


def backward(inputs: Inputs, saved: list[Tensor], do: Tensor, dstate: Tensor) -> dict[str, Tensor]:
    """Gradients of all of `Inputs.differentiable`, by name."""
    B, T, H, HV, K, _ = inputs.sizes
    by_value_head = (B, T, HV, K)
    found = {"dq": _empty(inputs, by_value_head), "dk": _empty(inputs, by_value_head)}
    found["dv"] = _empty(inputs, inputs.v.shape)
    if inputs.log_decay is not None:
        found["dlog_decay"] = _empty(inputs, (B, T, HV))
    if inputs.beta is not None:
        found["dbeta"] = _empty(inputs, (B, T, HV))
    if inputs.initial_state is not None:
        found["dinitial_state"] = _empty(inputs, inputs.state_shape)
    shared = torch.empty(inputs.sequences, HV, 2, dtype=torch.float64)
    given = {"do": _rows(do), "dstate": dstate.float().contiguous(), "dgate": shared}
    _run("memlm_backward", inputs, found | given | _names(inputs, saved))
    for name in ("dq", "dk") if H < HV else ():
        total = _empty(inputs, inputs.q.shape)
        arguments = (found[name].data_ptr(), total.data_ptr(), B * T * H, HV // H, K)
        _check(_library().memlm_sum_groups(*arguments, _threads(inputs)))
        found[name] = total
    gate, gate_times_decay = shared.sum(0).unbind(-1)
    if inputs.log_decay is not None and inputs.log_decay.ndim == 1:
        found["dlog_decay"] = gate
    if inputs.A_log is not None:
        found |= {"dA_log": gate_times_decay, "ddt_bias": gate}
    return {name: found[f"d{name}"] for name in inputs.differentiable()}


def step_in_place(inputs: Inputs) -> Tensor:
    """One token per row, the initial state overwritten with the new one."""
    o = _empty(inputs, inputs.v.shape)
    _run("memlm_forward", inputs, {"o": o, "state": inputs.initial_state})
    return o.to(inputs.v.dtype)


def saved_like(inputs: Inputs) -> list[Tensor]:
    """The states at the start of every chunk, laid out as the chunk states are; with the delta rule
    also the errors, the values less what the state held for their keys ``[B, T, HV, V]``."""
    states = _empty(inputs, inputs.chunk_states_shape)
    if inputs.cu_seqlens is not None:
        states.zero_()  # so that what is saved does not change from run to run in unused slots
    return [states] if inputs.beta is None else [states, _empty(inputs, inputs.v.shape)]


def _names(inputs: Inputs, saved: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("states", "errors"), saved, strict=False))


def _empty(inputs: Inputs, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=inputs.v.device)


POINTERS = (
    "o",
    "state",
    "chunk_states",
    "errors",
    "states",
    "dstate",
    "dq",
    "dk",
    "dv",
    "dlog_decay",
    "dbeta",
    "dinitial_state",
    "dgate",
)


class _Problem(ctypes.Structure):
    """`Problem` in native_chunks.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("threads", "N", "T", "H", "HV", "K", "V")),
        *((name, ctypes.c_int64) for name in ("l2norm", "sigmoid", "twice")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("bounds", "A_log", "dt_bias", "initial_state")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "log_decay", "beta", "do")),
        *((name, ctypes.c_int64 * 3) for name in ("sq", "sk", "sv", "sg", "sb", "so")),
        *((name, ctypes.c_void_p) for name in POINTERS),
    )


def _run(function: str, inputs: Inputs, tensors: dict[str, Tensor]) -> None:
    """Call the library on the inputs and on `tensors`, by their names in `_Problem`."""
    _, T, H, HV, K, V = inputs.sizes
    if inputs.cu_seqlens is not None:
        inputs.check()  # torch.compile has left out that of the boundaries
    rows = [_rows(x) for x in (inputs.q, inputs.k, inputs.v)]
    rows += [_gate(inputs.log_decay), _gate(inputs.beta), tensors.get("do")]
    packed = [
        None if inputs.cu_seqlens is None else inputs.cu_seqlens.long().contiguous(),
        *(_packed(x) for x in (inputs.A_log, inputs.dt_bias, inputs.initial_state)),
    ]
    problem = _Problem(
        *(_threads(inputs), inputs.sequences, T, H, HV, K, V),
        *(inputs.qk_l2norm, inputs.beta_sigmoid, inputs.allow_neg_eigval, inputs.scale),
        *(_pointer(x) for x in packed),
        *(_pointer(x) for x in rows),
        *((0, 0, 0) if x is None else _strides(x) for x in rows),
        *(_pointer(tensors.get(name)) for name in POINTERS),
    )
    _check(getattr(_library(), function)(ctypes.byref(problem)))


def _rows(x: Tensor) -> Tensor:
    """float32 with its channels side by side."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _gate(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Between rows, tokens and heads; those that all tokens share lie in one place."""
    return (0, 0, x.stride(0)) if x.ndim == 1 else x.stride()[:3]


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _threads(inputs: Inputs) -> int:
    B, T, _, HV, K, V = inputs.sizes
    return torch.get_num_threads() if B * T * HV * K * V >= PARALLEL else 1


def _check(good: int) -> None:
    if not good:
        raise MemoryError("linear_recurrence: no memory for a chunk's matrices")


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load(SOURCE)
    library.memlm_sum_groups.argtypes = (ctypes.c_void_p,) * 2 + (ctypes.c_int64,) * 4
    return library
