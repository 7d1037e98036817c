"""The comparison with lucidrains: the same layer, and what the command tells."""

import importlib.util
import json

import pytest
import torch

from benchmarks import library
from benchmarks.product_key import __main__ as command
from benchmarks.product_key import cpu, measure
from benchmarks.product_key.measure import OURS, PEER
from benchmarks.product_key.problem import Problem
from memlm.cuda.product_key import native

needs_peer = pytest.mark.skipif(
    importlib.util.find_spec("product_key_memory") is None,
    reason="product-key-memory is not installed (pip install 'memlm[bench]')",
)
NAMES = [
    pytest.param(name, marks=pytest.mark.native(native.SOURCE)) if one.kernels == "native" else name
    for name, one in OURS.items()
]
SMALL = Problem(16, 32, 2, 4, 64)


@needs_peer
@pytest.mark.parametrize("name", NAMES)
def test_the_layer_is_that_of_lucidrains(name):
    found = measure.differences(SMALL, name)
    assert len(found) == 5 and measure.agrees(found), found


@needs_peer
def test_another_layer_is_no_agreement(monkeypatch):
    name = "memlm torch, fused Adam"
    build = measure.build
    for parameter in ("keys", "values.weight", "norm.bias", "to_queries.weight"):

        def changed(problem, who, parameter=parameter):
            layer, optimizers = build(problem, who)
            if who != PEER:
                with torch.no_grad():
                    layer.get_parameter(parameter).mul_(1.05).add_(0.01)
            return layer, optimizers

        monkeypatch.setattr(measure, "build", changed)
        assert not measure.agrees(measure.differences(SMALL, name)), parameter
    assert not measure.agrees({"output": float("nan")})


@needs_peer
def test_steps_change_every_parameter():
    for name in (PEER, "memlm torch, fused Adam", "memlm torch, lazy Adam"):
        before = {
            key: p.detach().clone() for key, p in measure.build(SMALL, name)[0].named_parameters()
        }
        layer, optimizers = measure.build(SMALL, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measure, "build", lambda *_, built=(layer, optimizers): built)
            measure.step_of(SMALL, name)(0)
        for key, parameter in layer.named_parameters():
            assert not torch.equal(parameter, before[key]), (name, key)
            assert parameter.grad is None


@needs_peer
def test_updates_start_from_one_gradient():
    sparse, reads = cpu._gradient(SMALL)
    dense = sparse.to_dense()
    assert sparse._nnz() == 64 * 2 * 4 and dense.abs().sum() > 0
    rows, gradient = measure.row_gradients([reads], 256)
    torch.testing.assert_close(dense[rows], gradient)


@needs_peer
@pytest.mark.native(native.SOURCE)
def test_quick_run(tmp_path, capsys, monkeypatch):
    # Memory without processes of their own, which take seconds to start.
    monkeypatch.setattr(measure, "in_another_process", lambda function, *given: function(*given))
    monkeypatch.setattr(library.gc, "collect", lambda: 0)  # of all that pytest holds
    arguments = ["--device", "cpu", "--quick", "--repeats", "2", "--output", str(tmp_path)]
    assert command.main(arguments) == 0
    (path,) = tmp_path.glob("*/product_key_cpu_quick.json")
    found = json.loads(path.read_text())
    assert found["machine"]["threads"] == 1 and found["machine"]["product-key-memory"]
    assert [row["name"] for row in found["steps"]] == [PEER, *OURS]
    for row in found["steps"][1:]:
        assert row["faster"]["median"] > 0 and len(row["seconds"]) == 2
    assert found["updates"][0]["name"] == cpu.SPARSE
    assert all(row["faster"]["median"] > 0 for row in found["updates"][1:])
    printed = capsys.readouterr().out
    assert "The layers agree" in printed and str(path) in printed
