"""load: no damaged or hostile file can do more than raise CheckpointError."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.checkpoints import (
    FLOATS,
    build,
    mlp,
    rejected,
    snapshot,
)
from torch import Tensor, nn

import potstill
from potstill.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("quick")


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
    "config lacks a key": (edit(*CONFIG, value={"in_features": 32, "out_features": 48}), "was made from there"),
    "config of strings": (edit(*CONFIG, "in_features", value="32"), "was made from there"),
    "config of floats": (edit(*CONFIG, "in_features", value=32.0), "was made from there"),
    "bias of integers": (edit(*CONFIG, "bias", value=1), "was made from there"),
    "huge": (edit(*CONFIG, "in_features", value=10**12), "was made from there"),
    "beyond int64": (edit(*CONFIG, "out_features", value=10**40), "was made from there"),
    "negative": (edit(*CONFIG, "in_features", value=-32), "was made from there"),
    "infinite": (edit(*CONFIG, "in_features", value=float("inf")), "was made from there"),
    "other argument": (edit(*CONFIG, "device", value="cuda"), "was made from there"),
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
    rejected(mlp(), tmp_path / "model", "was made from there")


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
