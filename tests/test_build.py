"""The built extension in a fresh process: one OpenMP runtime, no side effects, the instruction set asked for."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

import potstill
from potstill import _C

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# The extension by itself: it does not need torch to load.
LOAD = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("potstill._C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.isa())
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_version_is_that_of_the_distribution():
    assert potstill.__version__ == importlib.metadata.version("potstill")


@linux_only
def test_import_has_no_side_effects_and_maps_no_second_openmp():
    code = """
import os, re, subprocess, torch

def state():
    with open("/proc/self/maps") as maps:
        openmp = {line.split()[-1] for line in maps if re.search(r"/lib[gi]?omp5?[-.][^/]*$", line)}
    assert len(openmp) == 1, openmp
    return (
        openmp,
        subprocess.check_output(["env"]),
        len(os.listdir("/proc/self/task")),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.random.get_rng_state().tolist(),
    )

before = state()
import potstill
assert state() == before
"""
    process = run(code)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


@linux_only
def test_torch_set_num_threads_rules_the_kernels():
    code = """
import os, torch
torch.set_num_threads(1)
from potstill.ops.int8_linear import int8_linear, pack

weight, scale, x = pack(torch.ones(512, 512, dtype=torch.int8)), torch.ones(512), torch.ones(256, 512)
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    int8_linear(x, weight, scale)
    print(len(os.listdir("/proc/self/task")) - before)
"""
    process = run(code)
    # The number only grows: a thread that libgomp ends may still be listed for a moment.
    assert process.stdout.split() == ["0", "1", "1"], process.stderr


@pytest.mark.parametrize("isa", ["avx512vnni", "avx512", "avx2", "neon", "scalar"])
def test_isa_can_be_forced(isa):
    process = run(LOAD, POTSTILL_ISA=isa)
    if isa in _C.isas():
        assert process.stdout.strip() == isa, process.stderr
    else:
        assert process.returncode != 0
        assert f"ImportError: isa '{isa}' is " in process.stderr  # not supported by this CPU, or not in this build


def test_empty_isa_is_as_if_unset():
    assert run(LOAD, POTSTILL_ISA="").stdout.strip() == _C.isas()[0]


def test_unknown_isa_fails_the_import_and_lists_the_known():
    process = run("import potstill", POTSTILL_ISA="avx1024")
    assert process.returncode != 0
    assert "ImportError: isa 'avx1024' is unknown; this build has " in process.stderr
    assert "scalar" in process.stderr


def test_use_isa_refuses_unknown_names():
    with pytest.raises(ValueError, match=r"isa 'sse2' is unknown; this build has .*scalar"):
        _C.use_isa("sse2")
