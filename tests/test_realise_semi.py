"""realise_ on a GPU: zeros that are 2:4 are a candidate there, and chosen only if they are faster.

The CPU stands in for the GPU, plain torch for the library of sparse units, and given times for the clock.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.sparse_unit_calls import Emulated
from torch import nn

from potstill import Prune, fuse_, prune_, realise_
from potstill.nn import Int8Linear, MaskedLinear, SemiSparseLinear
from potstill.ops import semi_sparse_int8_linear, sparse_units

REALISE: Any = sys.modules["potstill.transform.realise"]
Speed = Callable[[Callable[[dict[str, Any]], dict[str, float]]], None]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    emulated = Emulated()
    monkeypatch.setattr(sparse_units, "library", lambda _, dtype: emulated if dtype in emulated.sizes else None)
    monkeypatch.setattr(REALISE, "SEMI_DEVICES", frozenset({"cpu"}))
    kernel = semi_sparse_int8_linear.kernels["cuda"]
    monkeypatch.setitem(semi_sparse_int8_linear.kernels, "cpu", kernel)  # type: ignore[arg-type]
    return emulated


def pruned(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, torch.Tensor]:
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)).eval().to(dtype)
    prune_(model, Prune(pattern="2:4"))
    return model, torch.randn(80, 96).to(dtype)


def times(**named: float) -> Callable[[dict[str, Any]], dict[str, float]]:
    """Those of the names that start so, with _ for a space and ``semi`` for 2:4; else 1 second."""

    def of(calls: dict[str, Any]) -> dict[str, float]:
        given = {name.replace("semi", "2:4").replace("_", " "): value for name, value in named.items()}
        return {call: next((v for name, v in given.items() if call.startswith(name)), 1.0) for call in calls}

    return of


def test_the_faster_one_is_chosen(library: Emulated, speed: Speed) -> None:
    model, x = pruned()
    expected = model(x).detach()
    speed(times(int8=0.5, semi_int8=0.4))
    report = realise_(model, x)
    assert [row.action for row in report.rows] == ["2:4 int8"] * 2
    assert all(row.reason == "50% zeros: 1.25 times the speed of the dense int8 layer" for row in report.rows)
    assert all(isinstance(model[i], SemiSparseLinear) for i in (0, 2))
    assert model[0].tuned == [128]
    assert library.calls.count("compress") == 2
    assert float((model(x) - expected).norm() / expected.norm()) < 0.02
    assert not any(p.requires_grad for p in model.parameters())


def test_its_activation_is_fused(library: Emulated, speed: Speed) -> None:
    model, x = pruned()
    speed(times(semi_int8=0.4))
    realise_(model, x)
    expected = model(x)
    assert [row.action for row in fuse_(model, x, only_if_faster=False).rows] == ["fused"]
    assert isinstance(model[0], SemiSparseLinear)
    assert model[0].activation == "relu"
    torch.testing.assert_close(model(x), expected)


def test_float_weights_are_there_in_16_bits(library: Emulated, speed: Speed) -> None:
    model, x = pruned(torch.bfloat16)
    expected = model(x).detach()
    speed(times(semi_float=0.5))
    report = realise_(model, x, weights="float")
    assert [row.action for row in report.rows] == ["2:4 float"] * 2
    assert model[0].values.dtype == torch.bfloat16
    assert "search for 128 rows" in library.calls
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    wide, x = pruned()
    assert {row.action for row in realise_(wide, x, weights="float").rows} == {"dense"}


def test_one_that_is_not_faster_stays_dense_and_says_why(library: Emulated, speed: Speed) -> None:
    model, x = pruned()
    speed(times(int8=0.5, semi_int8=0.49))
    report = realise_(model, x)
    assert type(model[0]) is Int8Linear
    assert report.rows[0].reason == "50% zeros: 2:4 would have 1.02 times the speed of the dense int8 layer"


def test_without_the_gate_every_such_layer_is_made_so(library: Emulated, speed: Speed) -> None:
    model, x = pruned()
    speed(times(semi_int8=3.0, sparse=4.0))
    assert [row.action for row in realise_(model, x, only_if_faster=False).rows] == ["2:4 int8"] * 2


def test_zeros_from_elsewhere_count_too(library: Emulated, speed: Speed) -> None:
    model, x = pruned()
    plain = nn.Sequential(*(m.to_float() if isinstance(m, MaskedLinear) else m for m in model), nn.Linear(10, 7))
    speed(times(semi_int8=0.5))
    assert [row.names for row in realise_(plain.eval(), x).rows] == [("0",), ("2",)]
    assert isinstance(plain[2], SemiSparseLinear)


def test_other_zeros_are_no_candidate(library: Emulated, speed: Speed) -> None:
    model = nn.Sequential(nn.Linear(96, 64)).eval()
    prune_(model, Prune(0.6))
    speed(times(semi_int8=0.01))
    assert realise_(model, torch.randn(80, 96)).rows[0].action != "2:4 int8"
    assert not library.calls


def test_a_library_that_refuses_leaves_the_layer_to_our_kernel(
    library: Emulated, speed: Speed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(library, "compress", refuse)
    model, x = pruned()
    speed(times(semi_int8=0.5))
    assert realise_(model, x).rows[0].action == "2:4 int8"
    assert model[0].tuned == []


def test_on_a_cpu_they_are_no_candidates(speed: Speed) -> None:
    model, x = pruned()
    timed: set[str] = set()
    speed(lambda calls: timed.update(calls) or dict.fromkeys(calls, 1.0))  # type: ignore[func-returns-value]
    realise_(model, x, only_if_faster=False)
    assert timed == {"dense", "int8", "sparse int8, many rows", "sparse int8, few rows"}
