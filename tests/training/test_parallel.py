"""DDP and FSDP2 have the losses, gradients and weights of one process, with every memory."""

import pytest
import torch

from memlm.memory import memory_names
from tests.memory.processes import run_processes
from tests.training import parallel_worker as worker

EXACT = 1e-9  # of float64, where another order of sums is all that may differ
# Of lact as it is: on one process, weights that differ by 2e-16 already move its gradients by 1e-7.
AMPLIFIED = 1e-5


def require_the_same(count, kinds, names, dtype=torch.float64, tolerance=EXACT):
    """Compare what `count` processes find with what one finds."""
    results = run_processes(count, worker.train_all, names, kinds, dtype)[0]
    for name in names:
        expected = worker.train(name, None, dtype)
        for kind in kinds:
            found = results[name][kind]
            assert expected.keys() <= found.keys()
            for key, tensor in found.items():
                wanted = expected.get(key, torch.zeros_like(tensor))
                assert tensor.shape == wanted.shape
                error, scale = (tensor - wanted).abs().max(), wanted.abs().max().clamp(min=1)
                said = f"{name}, {kind} on {count}: {key} differs by {error:.1e} at {scale:.1e}"
                assert error <= tolerance * scale, said


def test_two_processes_with_all_memories():
    layers = worker.all_layers()
    entries = [layer.get(site) for layer in layers for site in ("mixer", "memory", "ffn")]
    named = {entry["type"] if isinstance(entry, dict) else entry for entry in entries}
    assert set(memory_names()) <= named
    require_the_same(2, worker.KINDS, [worker.ALL])


@pytest.mark.slow
def test_four_processes_with_all_memories():
    require_the_same(4, ("fsdp2",), [worker.ALL])


@pytest.mark.slow
@pytest.mark.parametrize(("count", "kinds"), [(2, worker.KINDS), (4, ("fsdp2",))])
def test_each_memory(count, kinds):
    amplifying = [name for name in worker.names() if name.startswith("lact")]
    require_the_same(count, kinds, [name for name in worker.names() if name not in amplifying])
    require_the_same(count, kinds, amplifying, tolerance=AMPLIFIED)


@pytest.mark.slow
def test_each_memory_in_float32():
    require_the_same(2, worker.KINDS, worker.names(), torch.float32, 1e-4)
