"""Every op of the registry, on every instruction set of this machine and every sample, against its reference."""

import inspect
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill import _C
from potstill.ops import OPS, Op
from potstill.ops.op import Sample
from potstill.timing import compare

CASES = [
    pytest.param(op, sample, id=f"{op.name}-{sample.label}") for op in OPS.values() for sample in op.samples("test")
]


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def first_tensor(arguments: dict[str, Any]) -> Tensor:
    return next(a for a in arguments.values() if isinstance(a, Tensor))


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers with the float inputs widened; scales and other fp32 statistics stay part of the definition."""
    return {
        name: a.double() if isinstance(a, Tensor) and a.dtype in (torch.float32, torch.bfloat16) else a
        for name, a in arguments.items()
    }


def assert_close(given: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    assert given.shape == exact.shape, what
    assert torch.equal(given.isnan(), exact.isnan()), f"{what}: NaN in different places"
    infinite = exact.isinf()
    assert torch.equal(given[infinite].double(), exact[infinite]), f"{what}: infinities differ"
    finite = torch.isfinite(exact)
    if finite.any():
        largest = exact[finite].abs().max().clamp_min(1e-30)
        error = float((given[finite].double() - exact[finite]).abs().max() / largest)
        assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_kernel_agrees_with_float64_reference(op: Op, sample: Sample, isa: str) -> None:
    arguments = sample.make()
    exact = tensors(op.reference(**in_float64(arguments)))
    _C.use_isa(isa)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        given = tensors(op(**arguments))
        tolerance = sample.slack * op.tolerance[first_tensor(arguments).dtype]
        for i, (g, e) in enumerate(zip(given, exact, strict=True)):
            assert_close(g, e.double(), tolerance, f"{op.name} {sample.label} result {i} {isa} {threads} threads")


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_reference_agrees_with_itself_in_float64(op: Op, sample: Sample) -> None:
    arguments = sample.make()
    exact = tensors(op.reference(**in_float64(arguments)))
    for g, e in zip(tensors(op.reference(**arguments)), exact, strict=True):
        assert_close(g, e.double(), op.tolerance[first_tensor(arguments).dtype], f"{op.name} {sample.label}")


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_fake_result_has_the_real_shape_and_dtype(op: Op, sample: Sample) -> None:
    arguments = sample.make()
    for fake, real in zip(tensors(op.fake(**arguments)), tensors(op(**arguments)), strict=True):
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@pytest.mark.filterwarnings("ignore")  # torch's own, from tracing
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_opcheck(op: Op, sample: Sample) -> None:
    arguments = sample.make()
    if any(r.isnan().any() for r in tensors(op(**arguments))):
        arguments = {
            n: a.nan_to_num() if isinstance(a, Tensor) and a.is_floating_point() else a for n, a in arguments.items()
        }
    torch.library.opcheck(getattr(torch.ops.potstill, op.name).default, tuple(arguments.values()))


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_schema_names_the_reference_arguments(op: Op) -> None:
    schema = getattr(torch.ops.potstill, op.name).default._schema
    parameters = inspect.signature(op.reference).parameters
    names = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(names) < len(parameters):  # the others are taken as one
        names += sys.modules[op.reference.__module__].Options._fields
    assert [a.name for a in schema.arguments] == names


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_wrong_arguments_are_named(op: Op) -> None:
    with pytest.raises(TypeError, match=op.name):
        op(nonsense=1)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_unsupported_dtype_takes_the_reference(op: Op) -> None:
    arguments = in_float64(next(iter(op.samples("test"))).make())
    assert op.backend("cpu", torch.float64)[0] == "reference"
    for g, e in zip(tensors(op(**arguments)), tensors(op.reference(**arguments)), strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("op", [op for op in OPS.values() if "cpu" in op.kernels], ids=lambda op: op.name)
def test_kernel_is_really_taken(op: Op) -> None:
    # A call that silently fell back to the reference would be as fast as the reference.
    arguments = next(iter(op.samples("bench"))).make()
    with torch.no_grad():
        calls = {"op": lambda: op(**arguments), "reference": lambda: op.reference(**arguments)}
        times = compare(calls, seconds=0.5)
    assert times["reference"].median > 3 * times["op"].median


# linear_kd_loss has none of its own: it is made of products and of kd_loss's.
GPU_OPS = [op for op in OPS.values() if "cuda" in op.kernels and op.name != "linear_kd_loss"]


@pytest.mark.parametrize("op", GPU_OPS, ids=lambda op: op.name)
def test_gpu_kernel_is_really_asked(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def launch(*_: Any) -> str:
        asked.append("launched")
        return "from the GPU"

    def function(module: str, name: str) -> Any:
        asked.append(f"{module}.{name}")
        return launch

    monkeypatch.setattr(sys.modules[f"potstill.ops.{op.name}"], "gpu_function", function)
    arguments = next(iter(op.samples("test"))).make()
    laid = arguments if op.lay_out is None else op.lay_out(arguments, "cuda")
    assert op.kernels["cuda"].function(*op.positional(**laid)) == "from the GPU"
    assert asked == [f"{op.name}.launch", "launched"]
