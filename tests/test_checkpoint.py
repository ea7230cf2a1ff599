"""save and load: exact round trips, atomic writing, and no file that can do more than raise CheckpointError."""

import json
import os
import pickle
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import potstill
from potstill import checkpoint
from potstill.errors import CheckpointError
from potstill.nn import Int8Linear
from potstill.ops.int8_linear import MAX_FEATURES
from potstill.transform import measure


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "_VISITS", 1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.body = nn.Linear(32, 32)
        self.again = self.body
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.again(self.body(self.embed(tokens))))


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(32, 20), nn.BatchNorm1d(20)
        self.register_buffer("offset", torch.arange(20))
        self.register_buffer("passing", torch.ones(20), persistent=False)
        self.register_buffer("nothing", None)
        self.mixed = nn.Parameter(torch.randn(20, 6).t())
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.scalar = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.layer(x)) + self.offset * self.passing) @ self.mixed.t() * self.scalar


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16, bias=False))


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)


def two_with_one_weight() -> nn.ModuleDict:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    return model


FLOATS, TOKENS = torch.randn(6, 32, generator=torch.Generator().manual_seed(3)), torch.arange(12).view(2, 6)
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, FLOATS),
    "bfloat16": (lambda: mlp().to(torch.bfloat16), FLOATS.to(torch.bfloat16)),
    "root": (lambda: nn.Linear(32, 16), FLOATS),
    "encoder": (encoder, FLOATS.view(2, 3, 32)),
    "tied": (Tied, TOKENS),
    "one weight": (two_with_one_weight, FLOATS),
    "buffers": (Buffers, FLOATS),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(32, 32)), nn.Linear(32, 4)), FLOATS),
    "no parameters": (nn.ReLU, FLOATS),
}


def build(name: str, seed: int, converted: bool) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name][0]().eval()
    if converted:
        potstill.quantize_(model, only_if_faster=False)
    return model


def snapshot(model: nn.Module) -> list[object]:
    """Everything of ``model`` that load could change."""
    modules = [(name, module, type(module), module.training) for name, module in model.named_modules()]
    flags = [getattr(m, "activation_relu_or_gelu", None) for m in model.modules()]
    tensors = [(n, id(t), t.dtype, t.tolist()) for n, t in (*model.named_parameters(), *model.named_buffers())]
    return [modules, flags, tensors, getattr(model, "use_nested_tensor", None)]


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
    assert not loaded.layers[0].activation_relu_or_gelu


def test_training_mode_is_that_of_the_fresh_model(tmp_path: Path) -> None:
    potstill.save(build("mlp", 0, True).eval(), tmp_path / "model")
    loaded = potstill.load(mlp().train(), tmp_path / "model")
    assert all(m.training for m in loaded.modules())


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    potstill.save(build("tied", 0, True), tmp_path / "tied")
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


def rejected(model: nn.Module, path: Path, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        potstill.load(model, path)
    assert snapshot(model) == before


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


# --- damaged and hostile files -------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Saves the MLP with ``change`` applied to its manifest and tensors."""
    potstill.save(build("mlp", 0, True), path)
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["potstill"])
    tensors = load_file(path)
    change(manifest, tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"potstill": json.dumps(manifest)})


def edit(*keys: object, value: object) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(manifest: Any, tensors: dict[str, Tensor]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


def set_tensor(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda manifest, tensors: tensors.update({name: value(tensors[name])})


def fill(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([1]), value)


CONFIG = ("modules", 0, "config")
HOSTILE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], object], str]] = {
    "newer format": (edit("format", value=2), "has format 2 .*reads format 1"),
    "boolean format": (edit("format", value=True), "has format True"),
    "no format": (lambda m, t: m.pop("format"), "has format None"),
    "more keys": (edit("code", value="import os"), "keys in the manifest"),
    "modules no list": (edit("modules", value={"0": 1}), "modules in the manifest"),
    "entry no object": (edit("modules", 0, value=7), "modules in the manifest"),
    "no names": (edit("modules", 0, "names", value=[]), "names in the manifest"),
    "names of numbers": (edit("modules", 0, "names", value=[0]), "names in the manifest"),
    "name twice": (edit("modules", 1, "names", value=["0"]), "a name comes twice"),
    "unknown name": (edit("modules", 0, "names", value=["9"]), "no module '9'"),
    "attribute as name": (edit("modules", 0, "names", value=["__class__"]), "no module '__class__'"),
    "root as name": (edit("modules", 0, "names", value=[""]), "'' is a Sequential"),
    "surrogate in name": (edit("modules", 0, "names", value=["\ud800"]), r"no module '\\ud800'"),
    "name of a ReLU": (edit("modules", 0, "names", value=["1"]), "'1' is a ReLU"),
    "unknown kind": (edit("modules", 0, "kind", value="os.system"), "unknown kind of module 'os.system'"),
    "kind no string": (edit("modules", 0, "kind", value=["int8_linear"]), "unknown kind"),
    "config no object": (edit(*CONFIG, value=[32, 48, True]), "config in the manifest"),
    "config lacks a key": (edit(*CONFIG, value={"in_features": 32, "out_features": 48}), "needs an nn.Linear there"),
    "config of strings": (edit(*CONFIG, "in_features", value="32"), "needs an nn.Linear there"),
    "config of floats": (edit(*CONFIG, "in_features", value=32.0), "needs an nn.Linear there"),
    "bias of integers": (edit(*CONFIG, "bias", value=1), "needs an nn.Linear there"),
    "huge": (edit(*CONFIG, "in_features", value=10**12), "needs an nn.Linear there"),
    "beyond int64": (edit(*CONFIG, "out_features", value=10**40), "needs an nn.Linear there"),
    "negative": (edit(*CONFIG, "in_features", value=-32), "needs an nn.Linear there"),
    "infinite": (edit(*CONFIG, "in_features", value=float("inf")), "needs an nn.Linear there"),
    "other argument": (edit(*CONFIG, "device", value="cuda"), "needs an nn.Linear there"),
    "aliases no object": (edit("aliases", value=[]), "aliases in the manifest"),
    "alias to nothing": (edit("aliases", "a", value="b"), "aliases in the manifest"),
    "alias of a tensor": (edit("aliases", "0.bias", value="0.scale"), "aliases in the manifest"),
    "alias to a number": (edit("aliases", "a", value=3), "aliases in the manifest"),
    "alias of no tensor": (edit("aliases", "a", value="0.bias"), "the model lacks 'a'"),
    "missing tensor": (lambda m, t: t.pop("0.scale"), "the file lacks '0.scale'"),
    "more tensors": (lambda m, t: t.update(x=torch.zeros(1)), "the model lacks 'x'"),
    "float weight": (set_tensor("0.weight", Tensor.float), "'0.weight' is float32"),
    "short weight": (set_tensor("0.weight", lambda t: t[:-1]), r"'0.weight' is int8 \[47, 32\]"),
    "flat weight": (set_tensor("0.weight", lambda t: t.reshape(-1)), r"'0.weight' is int8 \[1536\]"),
    "long scale": (set_tensor("0.scale", lambda t: t.repeat(2)), r"'0.scale' is float32 \[96\]"),
    "double scale": (set_tensor("0.scale", Tensor.double), "'0.scale' is float64"),
    "weight of -128": (set_tensor("0.weight", fill(-128)), "0.weight has the value -128"),
    "negative scale": (set_tensor("0.scale", fill(-1e-3)), "0.scale has values that are negative"),
    "NaN scale": (set_tensor("2.scale", fill(float("nan"))), "2.scale has values"),
    "infinite scale": (set_tensor("2.scale", fill(float("inf"))), "2.scale has values"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifests_and_tensors(case: str, tmp_path: Path) -> None:
    change, message = HOSTILE[case]
    rewrite(tmp_path / "model", change)
    rejected(mlp(), tmp_path / "model", message)


def test_unchanged_rewrite_loads(tmp_path: Path) -> None:
    rewrite(tmp_path / "model", lambda m, t: None)  # so that the cases above fail for their own reason
    assert torch.equal(potstill.load(mlp(), tmp_path / "model")(FLOATS), build("mlp", 0, True)(FLOATS))


@pytest.mark.parametrize(
    "manifest", ["", "{", "[]", "null", "7", "[" * 100_000, '{"format": ' + "9" * 5000 + "}", '{"format": NaN}']
)
def test_manifest_that_is_no_json_object(manifest: str, tmp_path: Path) -> None:
    save_file(build("mlp", 0, True).state_dict(), tmp_path / "model", {"potstill": manifest})
    rejected(mlp(), tmp_path / "model", "manifest|format")


def test_deep_manifest(tmp_path: Path) -> None:
    deep: Any = 0
    for _ in range(400):
        deep = [deep]
    rewrite(tmp_path / "model", edit(*CONFIG, "in_features", value=deep))
    rejected(mlp(), tmp_path / "model", "needs an nn.Linear there")


def test_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_file(mlp().state_dict(), path)
    rejected(mlp(), path, "no 'potstill' in its metadata")
    path.write_bytes(b"")
    rejected(mlp(), path, "not a complete safetensors file")
    path.write_bytes(pickle.dumps(mlp().state_dict()))
    rejected(mlp(), path, "not a complete safetensors file")
    torch.save(mlp().state_dict(), path)
    rejected(mlp(), path, "not a complete safetensors file")
    with pytest.raises(FileNotFoundError):
        potstill.load(mlp(), tmp_path / "nothing")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 6), nn.LayerNorm(6))
    model[1].weight = model[0].weight
    potstill.quantize_(model, only_if_faster=False)
    potstill.save(model, path)
    return path.read_bytes()


def loads_or_raises(data: bytes, path: Path) -> None:
    """Whatever is in the file: it loads completely, or CheckpointError is raised and the model is as it was."""
    path.write_bytes(data)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 6), nn.LayerNorm(6))
    before = snapshot(model)
    try:
        potstill.load(model, path)
    except CheckpointError:
        assert snapshot(model) == before
    else:
        model[0](torch.ones(2, 8))
        model[1](torch.ones(2, 8))


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_truncated_files(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    end = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path / "model"
    path.write_bytes(whole[:end])
    with pytest.raises(CheckpointError):
        potstill.load(nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 6), nn.LayerNorm(6)), path)


@FUZZ
@given(data=st.data())
def test_flipped_bytes(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    damaged = bytearray(whole)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.sampled_from([8, header, len(whole)]))
        damaged[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    loads_or_raises(bytes(damaged), tmp_path / "model")


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(data=st.data())
def test_mutated_manifests(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["potstill"])
    here: Any = manifest
    while True:  # walk to a random place and put a random value there
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(here[key], dict | list) and here[key] and data.draw(st.booleans()):
            here = here[key]
        else:
            here[key] = data.draw(values)
            break
    header["__metadata__"]["potstill"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    loads_or_raises(struct.pack("<Q", len(text)) + text + whole[8 + length :], tmp_path / "model")
