"""Mixed and Mixed.auto: another config for each layer, written by hand or chosen by sensitivity."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from tests.quantizing import Containers, convert, mlp, row, two_with_one_weight
from torch import Tensor, nn

import potstill
from potstill import Int4, Int8, Mixed
from potstill.errors import ConversionError, PotstillError
from potstill.nn import Int8Linear
from potstill.transform.sensitivity import Option, spend

pytestmark = pytest.mark.usefixtures("quick", "one_thread")


# --- by hand -------------------------------------------------------------------------------------------------------


def test_first_match_decides_and_no_match_keeps() -> None:
    report = convert(Containers(), config=Mixed({"several.1": None, "several.*": Int8(), "*.up": Int8()}))
    reasons = {r.names[0]: r.reason for r in report.kept}
    assert {r.names[0] for r in report.converted} == {"several.0", "named.up"}
    assert reasons["several.1"] == "Mixed asks to keep several.1"
    assert reasons["named.down"] == "no pattern of Mixed matches it"


def test_types_include_and_exclude() -> None:
    mixed = Mixed({nn.ModuleDict: Int8(), "*": None})
    report = convert(Containers(), config=mixed, exclude="*.up", include=["named.*", "chain.*"])
    assert [r.names[0] for r in report.converted] == ["named.down"]
    assert row(report, "named.up").reason == "excluded by *.up"
    assert row(report, "several.0").reason == "not in include"


def test_patterns_without_a_match_raise() -> None:
    model = mlp()
    with pytest.raises(ConversionError, match="Mixed: 'head' matches no layer"):
        convert(model, config=Mixed({"*": Int8(), "head": None}))
    assert not any(isinstance(m, Int8Linear) for m in model)


def test_wrong_values() -> None:
    with pytest.raises(TypeError, match="'a' is mapped to 'int8', expected Int8"):
        Mixed({"a": "int8"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="group_size is 48, expected 32, 64 or 128"):
        Int4(group_size=48)


def test_prints_as_python() -> None:
    mixed = Mixed({"lm_head": None, "*.mlp.*": Int4(64), "*": Int8()}, notes={"*": "the rest"})
    assert eval(repr(mixed)) == mixed
    assert "    '*': Int8(),  # the rest\n" in repr(mixed)
    assert "    Linear: Int8(),\n" in repr(Mixed({nn.Linear: Int8()}))


def test_layers_with_one_weight_need_one_config() -> None:
    report = convert(two_with_one_weight(), config=Mixed({"a": Int8(), "c": Int8()}))
    assert row(report, "a").reason == "weight is tied to b.weight, which is kept"
    assert row(report, "c").action == "int8"


# --- spending bits -------------------------------------------------------------------------------------------------


def options(errors: list[list[float]], bits: list[list[int]]) -> list[list[Option]]:
    return [
        [Option((), None, size, error) for size, error in zip(sizes, own, strict=True)]
        for sizes, own in zip(bits, errors, strict=True)
    ]


def test_bits_go_where_they_save_most_error() -> None:
    given = options([[10.0, 1.0, 0.0], [5.0, 4.0, 0.0], [1.0, 0.1, 0.0]], [[4, 8, 32]] * 3)
    assert [o.bits for o in spend(given, 12)] == [4, 4, 4]
    assert [o.bits for o in spend(given, 16)] == [8, 4, 4]
    assert [o.bits for o in spend(given, 20)] == [8, 8, 4]
    assert [o.bits for o in spend(given, 44)] == [8, 32, 4]
    assert [o.bits for o in spend(given, 1000)] == [32, 32, 32]


def test_spending_is_the_best_there_is() -> None:
    random = torch.Generator().manual_seed(1)
    for _ in range(20):
        sizes = torch.randint(1, 20, (6,), generator=random)
        bits = [[4 * n, 8 * n, 32 * n] for n in sizes.tolist()]
        errors = (torch.rand(6, 1, generator=random).square() * torch.tensor([[1.0, 0.06, 0.0]])).tolist()
        given, budget = options(errors, bits), int(sizes.sum()) * 9
        chosen = spend(given, budget)
        assert sum(o.bits for o in chosen) <= budget
        every = (c for c in itertools.product(*given) if sum(o.bits for o in c) <= budget)
        assert sum(o.error for o in chosen) == pytest.approx(min(sum(o.error for o in c) for c in every))


def test_spending_many_odd_sizes() -> None:
    """Sizes without a common divisor count in coarse units; the budget holds all the same."""
    random = torch.Generator().manual_seed(2)
    sizes = torch.randint(10**6, 10**7, (100,), generator=random).tolist()
    errors = torch.rand(100, generator=random).tolist()
    given = options([[e, e / 16, 0.0] for e in errors], [[4 * n, 8 * n, 32 * n] for n in sizes])
    budget = 10 * sum(sizes)
    spent = sum(o.bits for o in spend(given, budget))
    assert 0.99 * budget < spent <= budget


def test_worse_candidates_with_more_bits_are_never_chosen() -> None:
    assert [o.bits for o in spend(options([[0.5, 0.7]], [[4, 8]]), 100)] == [4]


def test_too_few_bits() -> None:
    model = mlp()
    with pytest.raises(PotstillError, match=r"average_bits is 3.*fewest bits have 8 on average"):
        Mixed.auto(model, [torch.randn(4, 32)], average_bits=3, candidates=[Int8(), None])


# --- by sensitivity ------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """The output hangs on ``much`` a hundred times as much as on ``little``."""

    def __init__(self) -> None:
        super().__init__()
        self.little, self.much, self.some, self.unused = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": 0.01 * self.little(x) + self.much(x) + 0.1 * self.some(x), "index": x.argmax(-1)}


def average_bits(mixed: Mixed, model: nn.Module) -> float:
    sizes = {name: model.get_submodule(name).weight.numel() for name in mixed.layers}
    bits = {name: 32 if config is None else config.bits for name, config in mixed.layers.items()}
    return sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())


@pytest.mark.parametrize(("bits", "kept"), [(8, 0), (13, 0), (14, 1), (25, 2), (32, 3)])
def test_sensitive_layers_get_the_bits(bits: float, kept: int) -> None:
    model, data = Branches(), [torch.randn(16, 32) for _ in range(3)]
    mixed = Mixed.auto(model, iter(data), bits, [Int8(), None])
    assert list(mixed.layers) == ["little", "much", "some", "unused"]
    assert [n for n in ("much", "some", "little", "unused") if mixed.layers[n] is None] == ["much", "some", "little"][
        :kept
    ]
    assert average_bits(mixed, model) <= bits
    assert bits - average_bits(mixed, model) < 6 or kept == 3  # one more layer would take 6
    report = convert(model, config=mixed)
    assert len(report.converted) == 4 - kept


def test_notes_tell_the_errors() -> None:
    mixed = Mixed.auto(Branches(), [torch.randn(16, 32)], 8, [Int8()])
    errors = {name: float(note.split()[1]) for name, note in mixed.notes.items()}
    assert errors["much"] > 10 * errors["some"] > 100 * errors["little"] > errors["unused"] == 0
    assert f"# error {errors['much']:.1e} as Int8()" in repr(mixed)


def test_tied_layers_get_one_config() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = two_with_one_weight()

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            return self.layers["a"](x), [self.layers["b"](x), 0.1 * self.layers["c"](x)]

    model = Model()
    mixed = Mixed.auto(model, [torch.randn(16, 32)], 20, [Int8(), None])
    assert mixed.layers == {"layers.a": Int8(), "layers.b": Int8(), "layers.c": Int8()} | {
        name: None for name, config in mixed.layers.items() if config is None
    }
    assert mixed.layers["layers.a"] == mixed.layers["layers.b"]
    assert model.layers["a"].weight is model.layers["b"].weight


def test_encoder_with_its_fused_path() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    mixed = Mixed.auto(model, [(torch.randn(2, 6, 32), torch.zeros(2))], 8, [Int8()])
    assert set(mixed.layers) == {f"layers.{i}.{part}" for i in (0, 1) for part in ("linear1", "linear2", "self_attn")}
    assert all(float(note.split()[1]) > 0 for note in mixed.notes.values())
    assert model.layers[0].activation_relu_or_gelu == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [0, 1, 5])
def test_the_model_is_as_it_was(fails_at: int, error: type[BaseException]) -> None:
    class Model(Branches):
        calls = 0

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            self.calls += 1
            if self.calls == fails_at:
                raise error("stop")
            return super().forward(x)

    model = Model().train()
    modules = dict(model.named_modules())
    if fails_at:
        with pytest.raises(error, match="stop"):
            Mixed.auto(model, [torch.randn(16, 32)], 8, [Int8()])
    assert len(Mixed.auto(model, [torch.randn(16, 32)], 8, [Int8()]).layers) == 4
    assert dict(model.named_modules()) == modules
    assert all(m.training for m in model.modules())


def test_what_cannot_be_measured() -> None:
    def empty() -> Iterator[Tensor]:
        yield from ()

    model = mlp()
    with pytest.raises(PotstillError, match="yielded nothing"):
        Mixed.auto(model, empty(), 8, [Int8()])
    with pytest.raises(PotstillError, match="can get one of the candidates"):
        Mixed.auto(nn.ReLU(), [torch.randn(3)], 8)
    counting = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0))
    counting.forward = lambda x: 3  # type: ignore[method-assign]
    with pytest.raises(PotstillError, match="no floating-point tensor"):
        Mixed.auto(counting, [torch.randn(3, 4)], 8, [Int8()])


def test_root_layer() -> None:
    model = nn.Linear(16, 16)
    mixed = Mixed.auto(model, [torch.randn(4, 16)], 8, [Int8()])
    assert mixed.layers == {"": Int8()}
    assert type(model) is nn.Linear
    assert len(convert(model, config=mixed).converted) == 1
    assert type(model) is potstill.nn.Int8Linear
