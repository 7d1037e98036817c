"""A layer of the neural memory through many chunks in C++: see native.cpp for the formulas."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm.cuda import native
from memlm.cuda.neural_memory.inputs import MAX_DEPTH, SHORTEST_WHOLE_CHUNK, Rule
from memlm.cuda.neural_memory.state import Layers, NeuralMemoryState

SOURCE = Path(__file__).with_name("native.cpp")
LONGEST = 2048  # tokens that lie in the workspace at a time
PARALLEL_GELU = 1 << 18  # fewer numbers than this take one thread
PARALLEL = 1 << 22  # fewer multiplications with the states than this take one thread


def refusal(v: Tensor, rule: Rule) -> str | None:
    """Why values v under this rule are not for this implementation, or None."""
    if v.device.type != "cpu":
        return f"the tensors are on {v.device.type}, it runs on the CPU"
    if v.dtype == torch.float64:
        return "the values are float64, it computes in float32"
    if not rule.whole_chunks:
        return f"it takes read='chunk_gates' and chunks of {SHORTEST_WHOLE_CHUNK} tokens or more"
    return native.refusal("neural_memory", SOURCE)


def step_refusal(v: Tensor, state: NeuralMemoryState, rule: Rule) -> str | None:
    """As `refusal`, of one token per sequence without gradients."""
    if v.device.type != "cpu":
        return f"the tensors are on {v.device.type}, it runs on the CPU"
    if v.dtype == torch.float64:
        return "the values are float64, it computes in float32"
    if rule.read == "chunk_gates" or len(state.weights) > state.depth:
        return "read='chunk_gates' and a gain are left to eager"
    return native.refusal("neural_memory", SOURCE)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        x = x.contiguous()
        value, slope = torch.empty_like(x), torch.empty_like(x) if with_slope else None
        _run_gelu("memlm_gelu", x, value, slope)
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return value, slope

    @staticmethod
    @once_differentiable
    def backward(ctx, dvalue: Tensor | None, dslope: Tensor | None) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dvalue = torch.zeros_like(x) if dvalue is None else dvalue.contiguous()
        dslope = None if dslope is None else dslope.contiguous()
        dx = torch.empty_like(x)
        _run_gelu("memlm_gelu_backward", x, dvalue, dslope, dx)
        return dx, None


def gelu(x: Tensor) -> Tensor:
    """gelu(x) in float32."""
    return _Gelu.apply(x, False)[0]


def gelu_with_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(x) and its derivative in float32, as `network.GeluWithSlope`."""
    return _Gelu.apply(x, True)


def _run_gelu(function: str, *tensors: Tensor | None) -> None:
    """Call the library on tensors of the same size (None: a null pointer)."""
    size = tensors[0].numel()
    threads = torch.get_num_threads() if size >= PARALLEL_GELU else 1
    pointers = (ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors)
    sizes = (ctypes.c_int64(size), ctypes.c_int64(threads))
    if not getattr(_library(), function)(*pointers, *sizes):
        raise MemoryError("neural_memory: no memory for threads")


class Chunks(torch.autograd.Function):
    """What `chunks.Chunks` is, in float32."""

    gelu = staticmethod(gelu)
    gelu_with_slope = staticmethod(gelu_with_slope)

    @staticmethod
    def kept_every(size: int) -> int:
        """Chunks between two kept states, a power of two; what lies in between is in the
        workspace."""
        return max(1, min(32, 1 << (LONGEST // size).bit_length() >> 1))

    @staticmethod
    def forward(ctx, x, a, e, W, S, n, beta, mu, full):
        given = {"x": x, "a": a, "e": e, "n": n, "mu": mu, "beta": beta, "W": W, "S": S}
        given["joins"] = None if bool(full.all()) else full.float()
        given = {name: None if t is None else t.contiguous() for name, t in given.items()}
        found = {"y": x.new_empty(*x.shape[:2], W.shape[-1])}
        found |= {"W_end": torch.empty_like(given["W"]), "S_end": torch.empty_like(given["S"])}
        every = Chunks.kept_every(x.shape[1] // len(mu))
        found["kept"] = W.new_empty((len(mu) - 1) // every, 2, *W.shape)
        _run("memlm_forward", given | found)
        needed = given | {name: found[name] for name in ("W_end", "kept")}
        ctx.save_for_backward(*needed.values())
        ctx.names = tuple(needed)
        ctx.set_materialize_grads(False)
        return found["y"], found["W_end"], found["S_end"]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dW, dS):
        given = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        differentiated = ("x", "a", "e", "n", "beta", "mu", "W", "S")
        found = {f"d{name}": torch.empty_like(given[name]) for name in differentiated}
        if dy is None:
            dy = given["x"].new_zeros(*given["x"].shape[:2], given["W"].shape[-1])
        towards = {"dy": dy, "dW_end": dW, "dS_end": dS}
        towards = {name: None if t is None else t.contiguous() for name, t in towards.items()}
        _run("memlm_backward", given | found | towards)
        order = ("dx", "da", "de", "dW", "dS", "dn", "dbeta", "dmu")
        return *(found[name] for name in order), None


SIZES = ("threads", "rows", "chunks", "C", "in", "out", "every")
GIVEN = ("x", "a", "e", "n", "mu", "beta", "joins", "W", "S")
FOUND = ("y", "W_end", "S_end", "kept")
BACKWARD = ("dy", "dW_end", "dS_end", "dx", "da", "de", "dn", "dW", "dS", "dbeta", "dmu")
POINTERS = GIVEN + FOUND + BACKWARD


class _Problem(ctypes.Structure):
    """`Problem` in native_chunks.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_void_p) for name in POINTERS),
    )


def _run(function: str, tensors: dict[str, Tensor | None]) -> None:
    """Call the library on tensors, by their names in `_Problem`."""
    rows, tokens, d_in = tensors["x"].shape
    chunks, d_out = len(tensors["mu"]), tensors["W"].shape[-1]
    threads = torch.get_num_threads() if rows * tokens * d_in * d_out >= PARALLEL else 1
    size = tokens // chunks
    sizes = (threads, rows, chunks, size, d_in, d_out, Chunks.kept_every(size))
    pointers = (tensors.get(name) for name in POINTERS)
    problem = _Problem(*sizes, *(None if t is None else t.data_ptr() for t in pointers))
    if not getattr(_library(), function)(ctypes.byref(problem)):
        raise MemoryError("neural_memory: no memory for the blocks of a layer")


_LAYERS = ("anchor", "weights", "momentum", "new_weights", "new_momentum")


class _Step(ctypes.Structure):
    """`Step` in native_step.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("threads", "rows", "heads", "depth")),
        *((name, ctypes.c_int64) for name in ("clips", "reads_anchor", "cycle")),
        ("clip", ctypes.c_double),
        ("widths", ctypes.c_int64 * (MAX_DEPTH + 1)),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "alpha", "eta", "theta", "offset")),
        *((name, ctypes.c_void_p * MAX_DEPTH) for name in _LAYERS),
        *((name, ctypes.c_void_p) for name in ("o", "loss", "square", "new_offset")),
    )


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    state: NeuralMemoryState,
    rule: Rule,
) -> tuple[Tensor, NeuralMemoryState, Tensor, Tensor]:
    """As `step.step`, in float32 and without gradients."""
    N, H, D = q.shape
    tokens = [x.contiguous() for x in (q, k, v, alpha, eta, theta, state.offset)]
    weights, momentum, anchor = (
        tuple(w.float().contiguous() for w in layers)
        for layers in (state.weights, state.momentum, state.anchor)
    )
    new_weights, new_momentum = (tuple(map(torch.empty_like, x)) for x in (weights, momentum))
    o, offset = torch.empty_like(tokens[0]), torch.empty_like(tokens[-1])
    loss, square = torch.empty_like(tokens[3]), torch.empty_like(tokens[3])
    entries = sum(w.numel() for w in weights)
    problem = _Step(
        torch.get_num_threads() if entries >= PARALLEL // 4 else 1,
        *(N * H, H, len(weights), rule.clip is not None, rule.read == "chunk_start"),
        *(0 if rule.exact else rule.cycle, rule.clip or 0.0),
        (ctypes.c_int64 * (MAX_DEPTH + 1))(D, *(w.shape[-1] for w in weights)),
        *(x.data_ptr() for x in tokens),
        *map(
            _pointers,
            (weights if rule.exact else anchor, weights, momentum, new_weights, new_momentum),
        ),
        *(x.data_ptr() for x in (o, loss, square, offset)),
    )
    found = _library().memlm_step(ctypes.byref(problem))
    if not found:
        raise MemoryError("neural_memory: no memory for the errors of a token")
    final = NeuralMemoryState(anchor, new_weights, new_momentum, offset)
    if found == 2 and rule.refresh and not rule.exact:
        final = final.refreshed(offset == 0)
    return o, final, loss, square.sqrt_()


def _pointers(layers: Layers) -> ctypes.Array:
    return (ctypes.c_void_p * MAX_DEPTH)(*(w.data_ptr() for w in layers))


@functools.cache
def _library() -> ctypes.CDLL:
    return native.load(SOURCE)
