from types import SimpleNamespace

import pytest

from potstill import timing
from potstill.timing import compare


class Machine:
    """A clock that only its own calls move, and a record of who was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        self.called: list[str] = []
        self.slowness = 1.0
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.called.append(name)
            self.now += seconds * self.slowness

        return run


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_times_are_exact_on_a_steady_machine(machine: Machine):
    times = compare({"a": machine.call("a", 1e-4), "b": machine.call("b", 3e-4)}, seconds=10)
    for name, expected in (("a", 1e-4), ("b", 3e-4)):
        assert (times[name].low, times[name].median, times[name].high) == pytest.approx((expected,) * 3)
        assert times[name].repeats == 9


def test_calls_take_turns_in_reversing_order(machine: Machine):
    compare({"a": machine.call("a", 1.0), "b": machine.call("b", 1.0), "c": machine.call("c", 1.0)}, rounds=2)
    calibration, rounds = machine.called[:6], machine.called[6:]
    assert calibration == list("aabbcc")
    assert rounds == list("aabbcc" + "ccbbaa")  # one untimed and one timed call each


def test_three_rounds_run_however_small_the_budget(machine: Machine):
    times = compare({"a": machine.call("a", 1.0)}, seconds=0.0)
    assert times["a"].repeats == 3


def test_budget_ends_the_rounds(machine: Machine):
    times = compare({"a": machine.call("a", 0.01)}, seconds=0.1, rounds=100)
    assert 3 < times["a"].repeats < 8
    assert machine.now < 0.2


def test_short_calls_fill_their_block(machine: Machine):
    compare({"a": machine.call("a", 1e-5)}, rounds=3, block=2e-3)
    assert len(machine.called) == pytest.approx(2 + 3 * (1 + 200), abs=3)


def test_interrupted_calibration_is_mended(machine: Machine):
    machine.slowness = 1000.0
    quick = machine.call("a", 1e-5)

    def call() -> None:
        if len(machine.called) == 2:
            machine.slowness = 1.0
        quick()

    compare({"a": call}, seconds=10, rounds=5)
    assert len(machine.called) > 4 * 190  # every round but the first fills its block


def test_median_ignores_a_spell_in_a_minority_of_rounds(machine: Machine):
    a, b = machine.call("a", 1e-3), machine.call("b", 2e-3)

    def spoilt() -> None:
        machine.slowness = 20.0 if 20 < len(machine.called) < 30 else 1.0
        a()

    times = compare({"a": spoilt, "b": b}, seconds=10)
    assert times["b"].median / times["a"].median == pytest.approx(2.0)
    assert times["a"].high >= times["a"].median >= times["a"].low
