"""The recorder of launches and the compilation without a GPU, on a kernel of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the program prints in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    program = ROOT / "tests" / "benchmarks" / "small_kernels.py"
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_types_and_options_of_a_launch(found):
    assert found["one"]["signature"] == {
        "a": "*bf16",
        "b": "*bf16",
        "out": "*fp32",
        "missing": "constexpr",
        "length": "i32",
        "step": "constexpr",
        "scale": "fp32",
        "C": "constexpr",
    }
    assert found["one"]["options"] == {"num_warps": 8, "maxnreg": 128, "arch": "sm90"}


def test_none_one_and_constexprs_are_constants(found):
    assert found["one"]["constants"] == {"(3,)": None, "(5,)": 1, "(7,)": 64}
    assert found["sixteen"]["constants"] == {"(3,)": None, "(7,)": 64}


def test_divisibility_by_16_spares_what_is_not_to_be_specialised(found):
    assert found["sixteen"]["divisible"] == [0, 1, 2, 5]
    assert found["seventeen"]["divisible"] == [0, 1, 2]
    assert found["sixteen"]["key"] != found["seventeen"]["key"]


def test_launchers_see_the_card_they_are_compiled_for(found):
    assert found["warps"] == {"80": 4, "90": 4, "100": 8}


def test_a_launch_is_compiled_once_per_signature_and_card(found):
    # Two launches, of a 32 and of a 64 bit length, on two cards.
    assert found["distinct"] == [["ordinary", 80]] * 2 + [["ordinary", 90]] * 2


def test_another_length_needs_no_new_binary_but_another_step_does(found):
    assert found["recompiled"] == [[], ["product_kernel"]]


def test_what_a_kernel_uses(found):
    for one in found["compiled"][:2]:
        assert one["faults"] == []
        assert 16 <= one["registers"] <= 255 and one["wgmma"] > 0
        assert one["shared"] == 2 * 64 * 64 * 2  # both operands, bfloat16


def test_faults_are_rows_not_exceptions(found):
    too_large, refused = found["compiled"][2:]
    assert too_large["shared"] >= 2 * 256 * 256 * 2
    assert any("shared memory" in fault for fault in too_large["faults"])
    assert refused["registers"] == 0 and "does not compile" in refused["faults"][0]


def test_the_interpreter_has_no_launches_to_record(monkeypatch):
    from benchmarks import aot

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), aot.recorded_launches(90):
        pass


def test_compile_all_refuses_the_interpreter(monkeypatch, capsys):
    from benchmarks import compile_all

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compile_all.main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
