"""save and load: exact round trips, atomic writing, and files that do not fit the model."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.checkpoints import (
    FLOATS,
    MODELS,
    Tied,
    build,
    encoder,
    mlp,
    rejected,
    snapshot,
)
from torch import nn

import potstill
from potstill import checkpoint
from potstill.errors import CheckpointError
from potstill.nn import Int8Linear, Int8TransformerEncoderLayer
from potstill.ops.int8_linear import MAX_FEATURES

pytestmark = pytest.mark.usefixtures("quick")


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(name: str, converted: bool, tmp_path: Path) -> None:
    model, x = build(name, 0, converted), MODELS[name][1]
    potstill.save(model, tmp_path / "model")
    fresh = build(name, 1, False)
    loaded = potstill.load(fresh, tmp_path / "model")
    assert loaded is fresh
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value)
        assert state[key].dtype == value.dtype
    assert [type(m).__name__ for m in loaded.modules()] == [type(m).__name__ for m in model.modules()]
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    assert os.listdir(tmp_path) == ["model"]


def test_load_into_a_model_that_is_converted_already(tmp_path: Path) -> None:
    potstill.save(build("mlp", 0, True), tmp_path / "model")
    loaded = potstill.load(build("mlp", 1, True), str(tmp_path / "model"))
    assert torch.equal(loaded(FLOATS), build("mlp", 0, True)(FLOATS))


def test_loaded_encoder_leaves_the_fast_path(tmp_path: Path) -> None:
    potstill.save(build("encoder", 0, True), tmp_path / "model")
    loaded = potstill.load(build("encoder", 1, False), tmp_path / "model")
    padding = torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        y = loaded(FLOATS.view(2, 3, 32), src_key_padding_mask=padding)
    assert torch.isfinite(y[~padding]).all()
    assert not loaded.use_nested_tensor
    assert type(loaded.layers[0]) is Int8TransformerEncoderLayer


def test_training_mode_is_that_of_the_fresh_model(tmp_path: Path) -> None:
    potstill.save(build("mlp", 0, True).eval(), tmp_path / "model")
    loaded = potstill.load(mlp().train(), tmp_path / "model")
    assert all(m.training for m in loaded.modules())


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = build("tied", 0, False)
    potstill.quantize_(model, include="body", only_if_faster=False)
    potstill.save(model, tmp_path / "tied")
    keys = set(load_file(tmp_path / "tied"))
    assert keys == {"embed.weight", "body.weight", "body.scale", "body.bias"}

    untied = Tied()
    untied.head.weight = nn.Parameter(torch.randn(50, 32))
    untied.again = nn.Linear(32, 32)
    loaded = potstill.load(untied, tmp_path / "tied")
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.again is loaded.body

    potstill.save(build("one weight", 0, True), tmp_path / "one")
    apart = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    loaded = potstill.load(apart, tmp_path / "one")
    assert loaded[0].weight is loaded[1].weight
    assert loaded[0].scale is loaded[1].scale
    assert torch.equal(loaded(FLOATS), build("one weight", 0, True)(FLOATS))


def test_model_that_ties_what_the_file_does_not(tmp_path: Path) -> None:
    apart = Tied()
    apart.head.weight = nn.Parameter(torch.randn(50, 32))
    potstill.save(apart, tmp_path / "model")
    model = Tied()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"one tensor in the model and two in the file"):
        potstill.load(model, tmp_path / "model")
    assert snapshot(model) == before


def test_views_of_one_memory_are_saved_whole(tmp_path: Path) -> None:
    model, flat = mlp(), torch.randn(32 * 48 + 48)
    model[0].weight.data, model[0].bias.data = flat[: 32 * 48].view(48, 32), flat[32 * 48 :]
    model.turned = nn.Parameter(model[2].weight.detach().t())
    potstill.save(model, tmp_path / "model")
    fresh = mlp()
    fresh.turned = nn.Parameter(torch.zeros(48, 16))
    loaded = potstill.load(fresh, tmp_path / "model")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_int8_file_is_a_quarter_of_the_float_one(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    potstill.save(model, tmp_path / "float")
    potstill.quantize_(model, only_if_faster=False)
    potstill.save(model, tmp_path / "int8")
    ratio = (tmp_path / "int8").stat().st_size / (tmp_path / "float").stat().st_size
    assert 0.25 < ratio < 0.26


def test_load_in_a_fresh_process(tmp_path: Path) -> None:
    model = build("mlp", 0, True)
    potstill.save(model, tmp_path / "model")
    program = f"""
        import potstill, torch
        from torch import nn
        model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16, bias=False))
        potstill.load(model, {str(tmp_path / "model")!r})
        torch.save(model(torch.linspace(-1, 1, 64).view(2, 32)), {str(tmp_path / "y")!r})
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(program)], check=True, timeout=120)
    y = torch.load(tmp_path / "y", weights_only=True)
    assert torch.equal(y, model(torch.linspace(-1, 1, 64).view(2, 32)))


def test_file_can_be_read_by_anyone_who_knows_safetensors(tmp_path: Path) -> None:
    model = build("mlp", 0, True)
    potstill.save(model, tmp_path / "model")
    with safe_open(tmp_path / "model", framework="pt") as file:
        manifest = json.loads(file.metadata()["potstill"])
        assert torch.equal(file.get_tensor("0.weight"), model[0].int8_weight())
    assert manifest["format"] == 1
    assert manifest["version"] == potstill.__version__
    assert manifest["aliases"] == {}
    assert manifest["modules"][0] == {"names": ["0"], "kind": "int8_linear", "config": model[0].config()}


# --- writing -------------------------------------------------------------------------------------------------------


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    potstill.save(build("mlp", 0, True), path)
    old = path.read_bytes()

    def half(tensors: object, filename: Path, metadata: object) -> None:
        filename.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        potstill.save(build("mlp", 1, True), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["model"]


def test_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    potstill.save(mlp(), tmp_path / "model")
    (tmp_path / "other").touch()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "other").stat().st_mode


class ExtraState(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ExtraState, "_extra_state is a dict"),
        (lambda: nn.Linear(4, 4, device="meta"), "weight is on the meta device"),
        (lambda: nn.LazyLinear(4), "not initialised yet"),
        (lambda: nn.ParameterDict({"a": torch.eye(3).to_sparse()}), "a has layout torch.sparse_coo"),
        (lambda: nn.ParameterDict({"a": torch.zeros(3, dtype=torch.complex128)}), "safetensors cannot hold"),
    ],
)
def test_models_that_cannot_be_saved(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        potstill.save(make(), tmp_path / "model")
    assert os.listdir(tmp_path) == []


# --- files that do not fit -----------------------------------------------------------------------------------------


def sequence(*sizes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, sizes[0]), nn.ReLU(), nn.Linear(sizes[0], sizes[1], bias=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(32, 48)), "the model has no module '2'"),
        (lambda: sequence(49, 16), "'0' is a Linear {'in_features': 32, 'out_features': 49, 'bias': True}"),
        (lambda: nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)), "'2' is a Linear .*'bias': True"),
        (lambda: nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()), "'0' is a ReLU in the model"),
        (lambda: nn.Sequential(nn.LazyLinear(48)), "not initialised yet"),
        (lambda: mlp().append(nn.LayerNorm(16)), "the file lacks '3.bias', '3.weight'"),
        (lambda: mlp().to(torch.bfloat16), r"'0.bias' is float32 \[48\] in the file and bfloat16 \[48\] in the model"),
        (lambda: mlp().to("meta"), "on the meta device"),
    ],
)
def test_other_models_are_rejected(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    potstill.save(build("mlp", 0, True), tmp_path / "model")
    model = make()
    if "meta" in message or "initialised" in message:
        with pytest.raises(CheckpointError, match=message):
            potstill.load(model, tmp_path / "model")
    else:
        rejected(model, tmp_path / "model", message)


def test_layer_that_no_kernel_supports(tmp_path: Path) -> None:
    size = MAX_FEATURES + 1
    config = {"in_features": size, "out_features": 1, "bias": False}
    entry = {"names": [""], "kind": "int8_linear", "config": config}
    manifest = {"format": 1, "version": "0", "modules": [entry], "aliases": {}}
    tensors = {"weight": torch.zeros(1, size, dtype=torch.int8), "scale": torch.ones(1)}
    save_file(tensors, tmp_path / "model", {"potstill": json.dumps(manifest)})
    rejected(nn.Linear(size, 1, bias=False), tmp_path / "model", "cannot be made: .*at most 133144")


def test_float_file_into_an_int8_model(tmp_path: Path) -> None:
    potstill.save(build("mlp", 0, False), tmp_path / "model")
    rejected(build("mlp", 1, True), tmp_path / "model", "the file lacks '0.scale', '2.scale'")


def test_long_lists_are_cut(tmp_path: Path) -> None:
    potstill.save(nn.Sequential(*(nn.Linear(2, 2) for _ in range(40))), tmp_path / "model")
    with pytest.raises(CheckpointError, match="and 68 more") as error:
        potstill.load(nn.Sequential(nn.Linear(2, 2)), tmp_path / "model")
    assert len(str(error.value)) < 600


class RefusesLate(nn.Module):
    """Raises in the middle of loading, after other tensors were written."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = encoder(), nn.Linear(4, 4)
        self.last.register_load_state_dict_pre_hook(self.refuse)

    def refuse(self, *_: object) -> None:
        raise RuntimeError("no thanks")


def test_model_that_refuses_in_the_middle_is_left_unchanged(tmp_path: Path) -> None:
    model = RefusesLate()
    potstill.quantize_(model, only_if_faster=False, exclude="last")
    potstill.save(model, tmp_path / "model")
    rejected(RefusesLate(), tmp_path / "model", "does not accept the tensors of .*no thanks")


def test_root_that_refuses_is_left_unchanged(tmp_path: Path) -> None:
    potstill.save(build("root", 0, True), tmp_path / "model")
    model = nn.Linear(32, 16)
    handle = Int8Linear._load_from_state_dict

    def refuse(*_: object) -> None:
        raise RuntimeError("no thanks")

    Int8Linear._load_from_state_dict = refuse  # type: ignore[assignment,method-assign]
    try:
        rejected(model, tmp_path / "model", "no thanks")
    finally:
        Int8Linear._load_from_state_dict = handle  # type: ignore[method-assign]
    assert type(model) is nn.Linear
