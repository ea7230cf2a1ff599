"""calibrate_: that its roundings are right and better, reach quantize_, and that nothing else is left in the model."""

import copy
import json
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.quantizing import convert, mlp, row, snr, two_with_one_weight
from torch import Tensor, nn

import potstill
from potstill import Int8, Mixed, calibrate_
from potstill.errors import ConversionError, PotstillError
from potstill.nn import Int8Linear
from potstill.ops.int8_linear import quantize_weight
from potstill.transform.calibrate import gptq as gptq_module
from potstill.transform.calibrate.clip import round_by_groups
from potstill.transform.calibrate.gptq import WORKSPACE, FactorisationError, gptq, inverse_factor
from potstill.transform.calibrate.moments import chunks
from potstill.transform.calibrate.weights import weights_of
from potstill.transform.grid import Grid
from potstill.transform.observe import inputs_of

pytestmark = pytest.mark.usefixtures("quick", "one_thread")

GRIDS = {
    "int8": Grid(-127, 127, None, True),
    "int4": Grid(-8, 7, 32, True, torch.bfloat16),
    "int4 zero": Grid(0, 15, 32, False, torch.bfloat16),
    "int4 128": Grid(-8, 7, 128, True, torch.bfloat16),
}


def correlated(rows: int, features: int, seed: int = 0) -> Tensor:
    """Inputs as those inside a network: a few directions carry most of them, and some features are strong."""
    shape = torch.Generator().manual_seed(features)
    mix = torch.randn(features // 8, features, generator=shape)
    strength = torch.rand(features, generator=shape) * 2
    random = torch.Generator().manual_seed(seed)
    few, each = (torch.randn(rows, size, generator=random) for size in (len(mix), features))
    return (few @ mix + 0.3 * each) * strength


def batches(features: int = 32, count: int = 4) -> list[Tensor]:
    return [correlated(256, features, seed) for seed in range(count)]


# --- rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [256, 200])
@pytest.mark.parametrize("name", GRIDS)
def test_gptq_is_far_better_on_inputs_it_has_not_seen(name: str, k: int) -> None:
    grid, weight, x = GRIDS[name], torch.randn(96, k), correlated(2000, k)
    seen, unseen = x[:1500], x[1500:]
    y = unseen @ weight.t()

    def db(integers: Tensor, scale: Tensor, zero: Tensor | None) -> float:
        return snr(y, unseen @ grid.weight(integers, scale, zero).t())

    moments = seen.t() @ seen
    nearest = db(*round_by_groups(weight, grid, None))
    clipped = db(*round_by_groups(weight, grid, moments.diagonal()))
    best = db(*gptq(weight, moments, grid)[:3])
    assert clipped > nearest - 0.2
    assert best > nearest + 4


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_gptq_agrees_with_its_definition(name: str) -> None:
    """Column by column, with the inverse of what is left of H computed anew each time."""
    grid, k = GRIDS[name], 160  # more than one block of columns
    weight, x = torch.randn(24, k), correlated(600, k)
    x = x[:, x.square().sum(dim=0).argsort(descending=True)]  # the order in which int8 columns are rounded
    moments = x.t() @ x
    integers, scale, zero, damping = gptq(weight, moments, grid)
    h = moments.double() + damping * moments.double().diagonal().mean() * torch.eye(k)
    w, each = weight.double(), scale.double().reshape(24, -1).repeat_interleave(grid.group or k, dim=1)
    expected = torch.empty_like(w)
    for j in range(k):
        expected[:, j] = grid.round(w[:, j], each[:, j], None)
        inverse = torch.linalg.inv(h[j:, j:])
        error = (w[:, j] - expected[:, j] * each[:, j]) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    assert zero is None
    assert (integers == expected).double().mean() > 0.998  # the rest are ties but for the last bits


def test_gptq_without_correlations_only_clips() -> None:
    weight = torch.randn(16, 70)
    integers, scale, _, _ = gptq(weight, 3 * torch.eye(70), GRIDS["int4"])
    clipped, expected, _ = round_by_groups(weight, GRIDS["int4"], torch.ones(70))
    assert torch.equal(integers, clipped)
    assert torch.equal(scale, expected)


def test_nearest_on_the_int8_grid_is_what_from_float_does() -> None:
    weight = torch.cat([torch.randn(10, 33), torch.zeros(1, 33), torch.full((1, 33), 1e-33), torch.full((1, 33), 7.0)])
    integers, scale, zero = round_by_groups(weight, GRIDS["int8"], None)
    expected = quantize_weight(weight)
    assert torch.equal(integers, expected[0])
    assert torch.equal(scale, expected[1])
    assert zero is None


def test_int4_scales_have_the_sign_of_the_largest_weight_and_fit_bfloat16() -> None:
    weight = torch.randn(20, 64)
    integers, scale, _ = round_by_groups(weight, GRIDS["int4"], None)
    assert torch.equal(scale, scale.bfloat16().float())
    groups, largest = integers.view(20, 2, 32), weight.view(20, 2, 32).abs().argmax(-1, keepdim=True)
    assert bool((groups.gather(2, largest) == -8).all())
    error = (GRIDS["int4"].weight(integers, scale, None) - weight).view(20, 2, 32).abs().amax(dim=-1)
    assert bool((error < 1.05 * scale.abs()).all())  # one that is as large, but of the other sign, becomes 7


@pytest.mark.parametrize("name", GRIDS)
def test_clipping_is_never_worse_and_helps_with_outliers(name: str) -> None:
    grid, k = GRIDS[name], 96
    weight, importance = torch.distributions.StudentT(3.0).sample((64, k)), torch.rand(k)

    def error(*rounded: Tensor) -> Tensor:
        return (weight - grid.weight(*rounded)).square() @ importance

    nearest, best = error(*round_by_groups(weight, grid, None)), error(*round_by_groups(weight, grid, importance))
    assert bool((best <= nearest * (1 + 1e-5)).all())
    assert float(best.sum()) < (1.0 if name == "int8" else 0.97) * float(nearest.sum())


def test_weights_of_inputs_that_were_always_zero_are_rounded_to_nearest() -> None:
    weight, x = torch.randn(32, 64), correlated(500, 64)
    x[:, [0, 5, 63]] = 0
    integers, scale, zero, _ = gptq(weight, x.t() @ x, GRIDS["int8"])
    error = (GRIDS["int8"].weight(integers, scale, zero) - weight)[:, [0, 5, 63]].abs()
    unclipped = weight[:, [0, 5, 63]].abs() <= 127 * scale[:, None]
    assert bool((error <= 0.51 * scale[:, None])[unclipped].all())


# --- factorisation -------------------------------------------------------------------------------------------------


def test_inverse_factor() -> None:
    x = correlated(300, 50)
    h = x.t() @ x
    factor, damping = inverse_factor(h)
    assert damping == 0.01
    assert torch.equal(factor, factor.triu())
    damped = h.double() + 0.01 * h.diagonal().double().mean() * torch.eye(50)
    torch.testing.assert_close(
        factor.double().t() @ factor.double() @ damped, torch.eye(50).double(), atol=1e-4, rtol=0
    )


def with_least_eigenvalue(value: float) -> Tensor:
    """A symmetric matrix with mean 1 on the diagonal, whose eigenvalues are ``value`` and others above 0.5."""
    q = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    eigenvalues = torch.full((20,), (20 - value) / 19).double()
    eigenvalues[0] = value
    return (q * eigenvalues @ q.t()).float()


@pytest.mark.parametrize(("value", "damping"), [(0.1, 0.01), (-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0)])
def test_damping_grows_until_the_factorisation_works(value: float, damping: float) -> None:
    h = with_least_eigenvalue(value)
    assert inverse_factor(h)[1] == damping
    assert gptq(torch.randn(4, 20), h, GRIDS["int8"])[3] == damping


def test_hopeless_factorisation_keeps_the_layer_at_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FactorisationError, match="even damped by 10"):
        inverse_factor(with_least_eigenvalue(-15.0))
    monkeypatch.setattr(gptq_module, "_DAMPINGS", (-2.0, -1.0))
    model = mlp()
    report = calibrate_(model, batches())
    assert [r.rounding for r in report.rows] == ["nearest"] * 2
    assert "not positive definite" in report.rows[0].reason
    assert report.rows[0].nearest_snr_db > 30
    assert row(convert(model), "0").rounding == "nearest"


# --- through quantize_ ---------------------------------------------------------------------------------------------


def with_weak_outliers() -> nn.Sequential:
    """The largest weights, which 255 values are spread over, are those of inputs that hardly matter."""
    model = mlp()
    with torch.no_grad():
        model[0].weight[:, :2] = 2 * torch.rand(48, 2)
    return model


def weak(x: Tensor) -> Tensor:
    return x * torch.where(torch.arange(32) < 2, 0.01, 1.0)


@pytest.mark.parametrize("method", ["gptq", "mse"])
def test_quantize_uses_and_reports_it(method: str) -> None:
    model = with_weak_outliers()
    x = weak(correlated(500, 32, seed=9))
    plain, y = copy.deepcopy(model), model(x)
    report = calibrate_(model, list(map(weak, batches())), method=method)
    assert report.rows[0] in report.calibrated
    assert report.rows[0].rows == 1024
    assert report.rows[0].snr_db > report.rows[0].nearest_snr_db + 1
    quantized = convert(model, sample_input=x)
    assert [type(m) for m in model] == [Int8Linear, nn.ReLU, Int8Linear]
    assert quantized.rows[0].rounding == method
    assert quantized.rows[0].snr_db > quantized.rows[0].nearest_snr_db
    assert f"{quantized.rows[0].nearest_snr_db:.1f} -> {quantized.rows[0].snr_db:.1f}" in str(quantized)
    assert json.loads(json.dumps(quantized.to_dict()))["layers"][0]["rounding"] == method
    before = convert(plain, sample_input=x)
    assert [r.rounding for r in before.rows] == ["nearest"] * 2
    assert before.rows[0].nearest_snr_db is None
    assert before.rows[0].snr_db == pytest.approx(quantized.rows[0].nearest_snr_db, abs=1e-6)
    assert snr(y, model(x)) > snr(y, plain(x)) + 0.5


def test_clipping_without_data() -> None:
    model = nn.Sequential(nn.Linear(8192, 8), nn.Linear(16, 2))  # of few weights int8 has no use for clipping any
    with torch.no_grad():
        model[0].weight.copy_(torch.distributions.StudentT(3.0).sample((8, 8192)))
        model[1].weight.copy_(torch.arange(32).view(2, 16) - 15)  # integers: nearest errs only by the scale
    report = calibrate_(model, None, method="mse")
    assert report.passes == 0
    assert [r.rounding for r in report.rows] == ["mse", "nearest"]
    assert report.rows[0].snr_db > report.rows[0].nearest_snr_db
    assert report.rows[1].reason == "mse is no better"
    assert row(convert(model), "0").rounding == "mse"


def left(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "calibrated_rounding" in vars(module)]


def test_state_dict_and_copies() -> None:
    model = mlp()
    state = copy.deepcopy(model.state_dict())
    calibrate_(model, batches())
    assert left(model) == ["0", "2"]
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    copied = copy.deepcopy(model)
    copied.load_state_dict(state)  # the same values: the rounding still holds
    for each in (copied, model):
        assert [r.rounding for r in convert(each).rows] == ["gptq"] * 2
        assert left(each) == []
    assert torch.equal(model[0].int8_weight(), copied[0].int8_weight())


def test_changed_weights_are_noticed() -> None:
    model = mlp()
    calibrate_(model, batches())
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-3
    report = convert(model)
    assert "weight has changed since calibrate_" in row(report, "0").reason
    assert row(report, "0").rounding == "nearest"
    assert row(report, "2").rounding == "gptq"
    model = mlp()
    calibrate_(model, batches())
    assert [r.rounding for r in convert(model.to(torch.bfloat16)).rows] == ["nearest"] * 2


def test_nothing_stays_in_layers_that_are_kept(speed: Callable) -> None:
    speed(lambda calls: {"float": 1.0, "int8": 2.0})
    model = mlp()
    calibrate_(model, batches())
    report = potstill.quantize_(model)
    assert not report.converted
    assert [r.rounding for r in report.rows] == ["", ""]
    assert left(model) == []


def test_mixed_and_later_calibrations() -> None:
    model = mlp()
    report = calibrate_(model, batches(), Mixed({"0": None, "*": Int8()}))
    assert [r.names for r in report.rows] == [("2",)]
    assert calibrate_(model, batches(), method="mse").rows[1].rows == 1024
    with pytest.raises(ConversionError, match="Mixed: 'x' matches no layer"):
        calibrate_(model, batches(), Mixed({"x": Int8()}))


def test_tied_layers_are_calibrated_once_for_both() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = two_with_one_weight()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers["a"](x).sum() + self.layers["b"](torch.cat([x, x])).sum() + self.layers["c"](x).sum()

    model = Model()
    report = calibrate_(model, [correlated(100, 32)])
    assert [(r.names, r.rows) for r in report.rows] == [(("layers.a", "layers.b"), 300), (("layers.c",), 100)]
    quantized = convert(model)
    assert [r.rounding for r in quantized.rows] == ["gptq"] * 3
    assert model.layers["a"].weight is model.layers["b"].weight
    assert model.layers["a"].bias is not model.layers["b"].bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_autocast_and_inference_mode(dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        calibrate_(model, [batch.to(dtype) for batch in batches()])
        assert [r.rounding for r in convert(model).rows] == ["gptq"] * 2
    x = torch.randn(2, 32, dtype=dtype, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


# --- what the loader does not show ---------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.zero, self.nan = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.zero(0 * x) + self.nan(x * float("nan"))


@pytest.mark.parametrize("method", ["gptq", "mse"])
def test_layers_without_usable_inputs(method: str) -> None:
    model = Odd()
    rows = {r.names[0]: r for r in calibrate_(model, batches(16), method=method).rows}
    assert rows["used"].rounding == method
    assert rows["unused"].reason == "the loader never calls it"
    assert rows["zero"].reason == "its inputs are all zero"
    assert rows["nan"].reason == "its inputs have NaN or infinite values"
    assert left(model) == ["used"]


def test_what_a_loader_may_yield() -> None:
    x, target, mask = torch.randn(4, 8), torch.zeros(4), torch.ones(4)
    for item, args, kwargs in [
        (x, [x], {}),
        ([x], [x], {}),
        ([x, target], [x], {}),
        ((x, mask, target), [x, mask], {}),
        (((x, mask), target), [x, mask], {}),
        ({"x": x}, [], {"x": x}),
        (({"x": x}, target), [], {"x": x}),
    ]:
        got = inputs_of(item)
        assert [a is b for a, b in zip(got[0], args, strict=True)] == [True] * len(args)
        assert got[1] == kwargs
    for wrong in ("text", 3, ()):
        with pytest.raises(TypeError, match="the loader yielded a"):
            inputs_of(wrong)


# --- memory --------------------------------------------------------------------------------------------------------


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(5)), nn.Linear(32, 64), nn.Linear(64, 8))


class Counting:
    def __init__(self) -> None:
        self.runs = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.runs += 1
        return iter(batches(count=2))


def test_layers_take_turns_where_memory_is_short() -> None:
    one = 32 * 32
    models, memory = (deep(), deep()), 4 * 4 * one + WORKSPACE * 4 * one
    parts = chunks(weights_of(models[0], Int8()), memory)
    assert [len(part) for part in parts] == [4 + 2, 1]  # where the last needs 4 times as much as the others
    for part in parts:
        entries = [weight.inputs**2 for weight in part]
        assert 4 * sum(entries) + WORKSPACE * max(entries) <= memory
    loader = Counting()
    few, many = calibrate_(models[0], loader, memory=memory), calibrate_(models[1], batches(count=2))
    assert loader.runs == few.passes == 2
    assert many.passes == 1
    assert [r.snr_db for r in few.rows] == [r.snr_db for r in many.rows]


def test_memory_that_does_not_suffice() -> None:
    with pytest.raises(PotstillError, match=r"6 has 64 inputs.* need 114,688 bytes, and memory is 100,000"):
        calibrate_(deep(), batches(), memory=100_000)
    calibrate_(deep(), batches(), memory=100_000, method="mse")
    model = deep()
    with pytest.raises(PotstillError, match="run over only once, but the second moments need 2 runs"):
        calibrate_(model, iter(batches()), memory=120_000)
    assert calibrate_(model, iter(batches())).passes == 1


# --- nothing is left behind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["first batch", "second run", "rounding"])
def test_interruptions_leave_the_model_as_it_was(
    when: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deep().train()
    model[1].eval()
    before = [(dict(vars(m)), m.training) for m in model.modules()]
    flags, runs = [m.training for m in model.modules()], []

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            runs.append(1)
            if when == "first batch" or (when == "second run" and len(runs) == 2):
                raise error("stop")
            return iter(batches())

    def failing(*args: Tensor) -> None:
        raise error("stop")

    with monkeypatch.context() as patch:
        if when == "rounding":
            patch.setattr("potstill.transform.calibrate.run.gptq", failing)
        with pytest.raises(error, match="stop"):
            calibrate_(model, Loader(), memory=120_000)
    assert [m.training for m in model.modules()] == flags
    assert [vars(m).keys() for m in model.modules()] == [state.keys() for state, _ in before]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert [r.rounding for r in calibrate_(model, batches()).rows] == ["gptq"] * 7


def test_random_state_and_statistics() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.Linear(32, 8)).train()
    data, statistics, state = batches(), model[2].running_mean.clone(), torch.get_rng_state()
    torch.set_num_threads(2)
    calibrate_(model, data)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[2].running_mean, statistics)


# --- arguments and report ------------------------------------------------------------------------------------------


def test_wrong_arguments() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="config is 'int8'"):
        calibrate_(model, batches(), "int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method is 'best'"):
        calibrate_(model, batches(), method="best")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"loader is a Tensor.* put a single batch in a list"):
        calibrate_(model, batches()[0])
    with pytest.raises(ValueError, match="gptq needs a loader"):
        calibrate_(model, None)
    with pytest.raises(PotstillError, match="yielded nothing"):
        calibrate_(model, [])


def test_report() -> None:
    report = calibrate_(Odd(), batches(16), quiet=True)
    text = str(report)
    assert "1 of 4 layers calibrated; runs over the loader: 1" in text
    used = report.rows[0]
    assert f"{used.nearest_snr_db:.1f} -> {used.snr_db:.1f}" in text
    assert "the loader never calls it" in text
    written = json.loads(json.dumps(report.to_dict()))
    assert written["layers"][0]["config"] == "Int8()"
    assert written["passes"] == 1


# --- the constructor -----------------------------------------------------------------------------------------------


def test_from_integers() -> None:
    integers, scale = quantize_weight(torch.randn(20, 12))
    bias = nn.Parameter(torch.randn(20))
    layer = Int8Linear.from_integers(integers, scale, bias)
    assert torch.equal(layer.int8_weight(), integers)
    assert layer.bias.data_ptr() == bias.data_ptr()
    assert not layer.bias.requires_grad
    x = torch.randn(5, 12)
    assert snr(x @ (integers * scale[:, None]).t() + bias, layer(x)) > 35
    for wrong in (integers.int(), integers[0], torch.full_like(integers, -128)):
        with pytest.raises(ValueError, match="integers are"):
            Int8Linear.from_integers(wrong, scale)
    for wrong in (scale.double(), scale[:3], scale[:, None]):
        with pytest.raises(ValueError, match="scale is"):
            Int8Linear.from_integers(integers, wrong)
