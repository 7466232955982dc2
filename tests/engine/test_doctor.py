"""rlcore doctor: what it finds, and that a kernel that is wrong, or breaks, fails the self-test."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

import rlcore as rl
from rlcore.cli import main
from rlcore.engine import doctor
from rlcore.ops import backend

needs_native = pytest.mark.skipif(backend.native() is None, reason="rlcore._native was not built")


@pytest.fixture
def quick(monkeypatch):
    """Without the second of measuring."""
    monkeypatch.setattr(doctor, "speed", lambda: {"gemm_gflops": 1.0, "linear_policy_loss_ratio": 2.0})


def test_json_holds_everything(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"] == rl.backends() and found["rlcore"] == rl.__version__
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["python"]
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_bytes"] > 2**28
    assert found["speed"]["gemm_gflops"] > 0 and found["speed"]["linear_policy_loss_ratio"] > 0.3
    live = [name for name, state in rl.backends().items() if state == "live" and name != "reference"]
    assert [(t["family"], t["backend"]) for t in found["self_test"]] == [(f, b) for b in live for f in doctor.FAMILIES]
    assert found["passed"] and all(t["passed"] and t["error"] < 1e-5 for t in found["self_test"])


def test_text(capsys, quick):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("machine", "torch", "reference", "self-test", "GFLOP/s", "2.00 x the time"):
        assert part in text
    for name, state in rl.backends().items():
        assert name in text and state in text


@needs_native
def test_isa_and_openmp_are_named(capsys, quick):
    main(["doctor"])
    text = capsys.readouterr().out
    features = backend.native().features()
    assert f"{features['isa']} instructions" in text and "OpenMP" in text and features["compiler"] in text


@needs_native
@pytest.mark.parametrize("family", doctor.FAMILIES)
def test_a_wrong_kernel_fails(capsys, quick, monkeypatch, family):
    """Any family that is 1 % off, or NaN, or breaks, by itself."""
    case = doctor.FAMILIES[family]

    def wrong(factor):
        def run(generator, dtype, device):
            out = case(generator, dtype, device)
            return [*out[:-1], out[-1] * factor] if dtype == torch.float32 else out

        return run

    def breaks(*arguments):
        raise RuntimeError("no such instruction")

    for broken, said in ((wrong(1.01), "FAIL"), (wrong(math.nan), "FAIL"), (breaks, "no such instruction")):
        monkeypatch.setitem(doctor.FAMILIES, family, broken)
        assert main(["doctor"]) == 1
        text = capsys.readouterr().out
        assert text.count("FAIL") == 1 and said in text


@needs_native
def test_the_kernels_are_really_called(monkeypatch):
    """Every family goes through the C++ module: without its functions none passes."""

    def missing(*arguments, **named):
        raise RuntimeError("not here")

    module = backend.native()
    for name in dir(module):
        if callable(getattr(module, name)) and not name.startswith("_"):
            monkeypatch.setattr(module, name, missing)
    tests = doctor.self_test()
    assert len(tests) == 4 and not any(test["passed"] for test in tests)
    assert all(test["why"] == "RuntimeError: not here" for test in tests)


def test_it_needs_torch_and_numpy_alone():
    code = (
        "import sys\n"
        "for name in 'tyro transformers reasoning_gym rich tomli tomllib matplotlib safetensors'.split():\n"
        "    sys.modules[name] = None\n"
        "from rlcore.cli import main\n"
        "sys.exit(main(['doctor']) + main(['methods']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
