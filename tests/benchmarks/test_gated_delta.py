"""The comparison runs from end to end at small sizes, on the CPU; what it tells is checked."""

import json

import pytest
import torch

from benchmarks.gated_delta import __main__ as command
from benchmarks.gated_delta import cuda, measure, peers
from benchmarks.gated_delta.problem import Problem


def test_quick_cpu_run(tmp_path, capsys):
    arguments = ["--device", "cpu", "--quick", "--repeats", "2", "--output", str(tmp_path)]
    assert command.main(arguments) == 0
    (path,) = tmp_path.glob("*/gated_delta_cpu_quick.json")
    found = json.loads(path.read_text())
    peer_names = ("memlm auto", "memlm eager", "transformers")
    verdicts = {row["peer"]: row["verdict"] for row in found["agreement"]}
    assert [verdicts[name] for name in peer_names] == ["agrees"] * 3
    measured = {(row["peer"], row["T"]) for row in found["lengths"] if len(row["samples"]) == 2}
    assert {(name, T) for name in peer_names for T in (128, 256, 512)} <= measured
    assert sum(found["packed"][0]["lengths"]) == 512 and len(found["packed"][0]["lengths"]) == 8
    assert {row["what"] for row in found["decoding"]} == {"operation", "model"}
    assert found["machine"]["threads"] == 1 and found["repeats"] == 2
    printed = capsys.readouterr().out
    assert "T=512 over T=128" in printed and "agrees" in printed and str(path) in printed


@pytest.mark.parametrize("repeats", ["0", "-1", "two"])
def test_repeats_are_checked(repeats, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--device", "cpu", "--repeats", repeats])
    assert stopped.value.code == 2
    assert "repeats" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_comparison_says_so(capsys):
    assert command.main(["--device", "cuda"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_the_gpu_tables_on_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr(peers, "flash_qla_peer", lambda: peers.Peer("FlashQLA", "not installed"))
    problems = [Problem(1, 96, 1, groups, 16, 16, torch.bfloat16) for groups in (1, 2)]
    found, agree = cuda.compare("cpu", problems, repeats=2, quick=True)
    assert agree and found["left_out"] == []
    rows = [row for row in found["sequences"] if row["peer"] == "memlm eager"]
    assert [row["pass"] for row in rows] == ["forward", "backward"] * 2
    for row in rows:
        assert row["ratio"].median == 1 and row["base"] == "memlm eager"
        heads = 96 * (2 if "1/2" in row["problem"] else 1)
        assert row["ns_per_token_head"] == pytest.approx(1e9 * row["seconds"] / heads)
        problem = {str(problem): problem for problem in problems}[row["problem"]]
        moved, flops = (
            (problem.forward_bytes(), problem.forward_flops())
            if row["pass"] == "forward"
            else (problem.backward_bytes(), problem.backward_flops())
        )
        copied = row["copy_percent"] / 100 * found["copy_bytes_per_second"]
        multiplied = row["matmul_percent"] / 100 * found["matmul_flops_per_second"]
        assert copied * row["seconds"] == pytest.approx(moved)
        assert multiplied * row["seconds"] == pytest.approx(flops)
    assert {row["pass"] for row in found["steps"]} == {"step"}
    assert "not compared: FlashQLA: not installed" in capsys.readouterr().out


def test_sizes_left_out_for_time_are_named(capsys, monkeypatch):
    for ceiling in ("copy_ceiling", "matmul_ceiling"):
        monkeypatch.setattr(cuda, ceiling, lambda *_: 1.0)
    problems = [Problem(1, 64, 1, 1, 16, 16, torch.bfloat16)]
    found, _ = cuda.compare("cpu", problems, repeats=1, quick=True, seconds=0)
    assert found["sequences"] == [] and found["left_out"] == [str(problems[0])]
    assert f"time was up: {problems[0]}" in capsys.readouterr().out


def test_a_wrong_implementation_of_ours_is_no_agreement(capsys):
    def wrong(tensors):
        o, state = peers.memlm_peer("eager").run(tensors)
        return o * 1.01, state

    def raises(tensors):
        raise RuntimeError("out of order")

    problem = Problem(1, 40, 1, 1, 8, 8)
    for run, verdict in ((wrong, "DISAGREES"), (raises, "out of order")):
        ours = peers.Peer("memlm broken", run)
        rows, agree = measure.agreement(problem, [ours, peers.transformers_peer()])
        assert not agree and verdict in rows[0]["verdict"] and rows[1]["verdict"] == "agrees"
    # A peer may be wrong: it is told, and is no reason to stop.
    rows, agree = measure.agreement(problem, [peers.Peer("theirs", wrong)])
    assert agree and "DISAGREES" in rows[0]["verdict"]


def test_absent_peers_keep_their_reason():
    missing = peers._external_peer("missing", "no_such_module", "function", "step")
    assert "No module named 'no_such_module'" in missing.run
    assert measure.absent([missing]) == {"missing": missing.run}
    assert measure.present([missing], 1) == measure.present([missing], 9) == []


def test_transformers_does_not_take_packed_sequences_for_one():
    problem = Problem(1, 10, 1, 1, 8, 8, lengths=(4, 6))
    with pytest.raises(ValueError, match="packed"):
        peers.transformers_peer().run(problem.tensors())


def test_bytes_and_flops_by_hand():
    # One head, K = V = 64 in bfloat16: q, k, v, o, T_0 of 128 bytes each per token.
    problem = Problem(1, 64, 1, 1, 64, 64, torch.bfloat16)
    state = 4 * 64 * 64
    assert problem.forward_bytes() == 64 * (7 * 128 + 4 + 8) + state
    # k, v, T_0 and the states (2 bytes x 64 x 64 per 64 tokens), then q, k, v, do, T_0, the
    # states, dq, dk, dv; three times gates.
    assert problem.backward_bytes() == 64 * (4 * 128 + 8 + 9 * 128 + 16) + state
    assert problem.forward_flops() == 64 * 14 * 64 * 64
    assert problem.backward_flops() == 64 * 2 * 64 * 64 * (2 + 1 + 4 + 6 + 6)
    grouped = Problem(1, 64, 1, 4, 64, 64, torch.bfloat16)
    saved = 3 * 3 * 64 * 128  # q, k, k of three value heads out of four
    assert grouped.forward_bytes() == 4 * problem.forward_bytes() - saved


def test_inputs_are_those_of_a_new_layer():
    problem = Problem(2, 500, 2, 4, 8, 6)
    tensors = problem.tensors(seed=3)
    assert tensors["q"].shape == (2, 500, 2, 8) and tensors["v"].shape == (2, 500, 4, 6)
    assert tensors["log_decay"].max() < 0 and 0 < tensors["beta"].min() < tensors["beta"].max() < 1
    assert torch.equal(tensors["q"], problem.tensors(seed=3)["q"])
    assert not torch.equal(tensors["q"], problem.tensors(seed=4)["q"])
    packed = Problem(1, 10, 1, 1, 8, 8, lengths=(4, 6)).tensors()
    assert packed["cu_seqlens"].tolist() == [0, 4, 10]
