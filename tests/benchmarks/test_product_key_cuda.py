"""The comparison on a GPU, in small and on the CPU."""

import torch

from benchmarks.product_key import cuda
from benchmarks.product_key.problem import Problem


def test_all_compute_the_same_on_a_cpu(capsys):
    results, agree = cuda.compare("cpu", Problem(8, 16, 1, 2, 8), repeats=1)
    assert agree
    assert results["copy_bytes_per_second"] > 0
    rows = {row["name"]: row for row in results["gather"] + results["layer"] + results["gradient"]}
    assert "unavailable" in rows["cuda"]["seconds"]
    assert rows["eager"]["copy_percent"] > 0
    assert rows[cuda.OURS][f"faster than {cuda.TORCH_FLOAT32}"].median > 0
    assert rows[cuda.DETERMINISTIC]["slower"].median > 0
    printed = capsys.readouterr().out
    assert "All agree" in printed and "at least 85 % of a copy" in printed


def test_another_result_is_no_agreement():
    one = torch.ones(3)
    runs = {"wrong": lambda _: one + 0.1, "right": lambda _: one + 1e-3, "base": lambda _: one}
    found = cuda._differences(runs)
    assert found["wrong"] > cuda.TOLERANCE > found["right"]
