"""quantize_ with rules for whole blocks: which of a block and its parts are replaced."""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from tests.quantizing import convert, row
from torch import Tensor, nn

import potstill
from potstill import Int8, Mixed
from potstill.nn import Int8Linear
from potstill.transform import rules, survey
from potstill.transform.observe import BlockCalls, Call, usual_calls
from potstill.transform.rules.linear import LinearToInt8
from potstill.transform.rules.rule import Arguments, Rule
from potstill.transform.swap import Site

pytestmark = pytest.mark.usefixtures("quick", "one_thread")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.down(torch.relu(self.up(x))) * scale


class FastBlock(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.up, self.down = Int8Linear.from_float(block.up), Int8Linear.from_float(block.down)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.down(torch.relu(self.up(x))) * scale


class BlockRule(Rule[BlockCalls]):
    source, target, config, action = Block, FastBlock, Int8, "int8"

    def why_not(self, site: Site) -> str:
        return "has hooks" if site.module._forward_hooks else ""

    def why_not_call(self, call: Call) -> str:
        return ""

    def watch(self) -> BlockCalls:
        return BlockCalls()

    def usual(self, module: nn.Module) -> Mapping[Call, int]:
        return {Call(8, torch.float32, None): 1}

    def build(self, module: Block, config: Int8, rounding: object) -> FastBlock:
        return FastBlock(module)

    def arguments(self, module: Block, call: Call, calls: BlockCalls | None) -> Arguments:
        return calls.examples[call] if calls else ((torch.randn(8, 16),), {})

    def example(self, module: Block, calls: BlockCalls) -> Arguments:
        return next(iter(calls.examples.values()), ((torch.randn(8, 16),), {}))

    def shape(self, module: Block) -> tuple[int, ...]:
        return 16, 32, 16

    def weights(self, module: nn.Module) -> tuple[str, ...]:
        return "up.weight", "down.weight"


@pytest.fixture(autouse=True)
def _rule(monkeypatch: pytest.MonkeyPatch) -> None:
    both = (*rules.RULES, BlockRule())
    monkeypatch.setattr(rules, "RULES", both)
    monkeypatch.setattr(survey, "RULES", both)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Block(), Block(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x), scale=2.0))


def kinds(model: Model) -> list[type]:
    return [type(model.first), type(model.second), type(model.head)]


def test_a_block_is_replaced_as_a_whole() -> None:
    model = Model()
    y, x = model(torch.ones(3, 16)), torch.ones(3, 16)
    report = convert(model, sample_input=torch.randn(3, 16))
    assert kinds(model) == [FastBlock, FastBlock, Int8Linear]
    assert [r.names for r in report.rows] == [("first",), ("second",), ("head",)]
    assert report.rows[0].shape == (16, 32, 16)
    assert report.rows[0].rows == {3: 1}
    assert report.rows[1].snr_db > 30
    assert torch.allclose(model(x), y, atol=0.05)
    assert [r.reason for r in convert(model).rows] == ["already int8"] * 3


def test_parts_are_tried_where_the_whole_is_slower(speed: Callable) -> None:
    def seconds(calls: dict[str, Any]) -> dict[str, float]:
        whole = calls["float"]().shape[-1] == 16 and seconds.turn < 2  # type: ignore[attr-defined]
        seconds.turn += 1  # type: ignore[attr-defined]
        return {"float": 4.0, "int8": 5.0 if whole else 1.0}

    seconds.turn = 0  # type: ignore[attr-defined]
    speed(seconds)
    model = Model()
    report = potstill.quantize_(model, sample_input=torch.randn(3, 16))
    assert kinds(model) == [Block, Block, Int8Linear]
    assert type(model.first.up) is type(model.second.down) is Int8Linear
    assert row(report, "first").reason == "int8 is slower: 0.80 times the speed"
    assert row(report, "first").ms_before is None  # it is in the rows of the parts
    assert report.ms_before == pytest.approx(5 * 4000)
    assert report.ms_after == pytest.approx(5 * 1000)


def test_a_block_whose_part_is_asked_to_be_otherwise_is_left_whole() -> None:
    model = Model()
    report = convert(model, exclude="first.up")
    assert kinds(model) == [Block, FastBlock, Int8Linear]
    assert row(report, "first").reason == "its part first.up is to be kept"
    assert (row(report, "first.up").action, row(report, "first.down").action) == ("kept", "int8")
    model = Model()
    report = convert(model, config=Mixed({"second.down": None, "*": Int8()}))
    assert kinds(model) == [FastBlock, Block, Int8Linear]
    assert type(model.second.up) is Int8Linear


def test_a_block_that_cannot_be_replaced_leaves_its_parts() -> None:
    model = Model()
    model.first.register_forward_hook(lambda *_: None)
    report = convert(model)
    assert kinds(model) == [Block, FastBlock, Int8Linear]
    assert row(report, "first").reason == "has hooks"
    assert type(model.first.up) is Int8Linear


def test_include_by_name_takes_the_whole_or_the_part() -> None:
    assert [r.names[0] for r in convert(Model(), include="first").converted] == ["first"]
    assert [r.names[0] for r in convert(Model(), include="first.up").converted] == ["first.up"]


def test_weights_tied_between_blocks() -> None:
    model = Model()
    model.second.up.weight = model.first.up.weight
    report = convert(model)
    assert kinds(model) == [Block, Block, Int8Linear]
    assert "weights of first and second are tied" in row(report, "first").reason
    assert model.second.up.weight is model.first.up.weight  # as parts they can be tied
    assert type(model.first.up) is Int8Linear


def test_parts_of_a_block_are_rounded_as_calibrated() -> None:
    torch.manual_seed(0)
    model, mix = Model(), torch.randn(4, 16)
    data = [torch.randn(256, 4) @ mix for _ in range(4)]
    calibration = potstill.calibrate_(model, data)
    assert [r.names[0] for r in calibration.rows] == ["first.up", "first.down", "second.up", "second.down", "head"]
    with torch.no_grad():
        model.second.up.weight += 1e-3
    report = convert(model, sample_input=data[0])
    assert kinds(model) == [FastBlock, FastBlock, Int8Linear]
    first = row(report, "first")
    assert first.rounding == "gptq"
    assert first.snr_db > first.nearest_snr_db
    assert "up: its weight has changed since calibrate_" in row(report, "second").reason
    assert not any("calibrated_rounding" in vars(m) for m in model.modules())


def test_sensitivity_looks_at_parts() -> None:
    mixed = Mixed.auto(Model(), [torch.randn(4, 16)], 8, [Int8()])
    assert list(mixed.layers) == ["first.up", "first.down", "second.up", "second.down", "head"]
    model = Model()
    convert(model, config=mixed)
    assert kinds(model) == [Block, Block, Int8Linear]


def test_a_call_is_judged_by_its_own_device() -> None:
    rule = LinearToInt8()
    half = {device: rule.why_not_call(Call(8, torch.float16, None, device=device)) for device in ("cpu", "cuda", "xpu")}
    assert "the cpu kernel takes" in half["cpu"]
    assert "no xpu kernel" in half["xpu"]
    needed = "" if importlib.util.find_spec("triton") else "triton"
    assert needed in half["cuda"]
    assert bool(needed) == bool(half["cuda"])


def test_usual_calls_are_on_the_device_of_the_layer() -> None:
    calls = usual_calls(torch.float32, "cuda", (1, 5))
    assert {(call.rows, call.device): count for call, count in calls.items()} == {(1, "cuda"): 1, (5, "cuda"): 1}
    assert Call(1, torch.float32, None) not in calls
