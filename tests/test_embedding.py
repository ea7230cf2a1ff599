"""The int8 embedding and its op beyond what the registry walk covers."""

import copy
import io
import pickle

import pytest
import torch
from tests.quantizing import snr
from torch import Tensor, nn

from potstill import _C
from potstill.nn import Int8Embedding
from potstill.ops import int8_embedding


@pytest.mark.parametrize("isa", _C.isas())
def test_every_isa_gives_the_bits_of_the_reference_also_with_threads(isa: str) -> None:
    _C.use_isa(isa)
    weight = torch.randint(-127, 128, (500, 193), dtype=torch.int8)
    scale, indices = torch.rand(500), torch.randint(500, (40, 33))
    for dtype in (torch.float32, torch.bfloat16):
        expected = int8_embedding.reference(weight, scale, indices, dtype)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(int8_embedding(weight, scale, indices, dtype), expected)


@pytest.mark.parametrize("index", [-1, 10, 2**40, -(2**62)])
def test_an_index_outside_the_table_raises(index: int) -> None:
    arguments = (torch.zeros(10, 4, dtype=torch.int8), torch.ones(10), torch.tensor([[3, index]]))
    for function in (int8_embedding, int8_embedding.reference):
        with pytest.raises(ValueError, match=rf"indices has the value {index}; expected rows .* from 0 to 9"):
            function(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(10, 4)}, "weight"),
        ({"weight": torch.zeros(10, dtype=torch.int8)}, "weight"),
        ({"scale": torch.ones(9)}, "scale"),
        ({"indices": torch.zeros(2)}, "indices"),
        ({"indices": torch.zeros(2, dtype=torch.bool)}, "indices"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    arguments = {
        "weight": torch.zeros(10, 4, dtype=torch.int8),
        "scale": torch.ones(10),
        "indices": torch.tensor([1]),
    } | change
    for function in (int8_embedding, int8_embedding.reference):
        with pytest.raises(ValueError, match=f"int8_embedding: .*{message}"):
            function(**arguments)


def test_layer_is_close_to_the_float_layer() -> None:
    embedding, x = nn.Embedding(300, 64, padding_idx=7), torch.randint(300, (4, 50))
    layer = Int8Embedding.from_float(embedding)
    assert snr(embedding(x), layer(x)) > 40
    assert not layer(torch.tensor(7)).any()
    assert (layer.weight.requires_grad, layer(x).requires_grad) == (False, False)
    back = layer.to_float()
    assert (back.padding_idx, back.weight.requires_grad) == (7, True)
    assert torch.equal(back(x), layer(x))


@pytest.mark.parametrize("option", ["max_norm", "sparse", "scale_grad_by_freq"])
def test_embeddings_that_train_or_change_are_refused(option: str) -> None:
    embedding = nn.Embedding(10, 4, **{option: True})
    with pytest.raises(ValueError, match=f"Int8Embedding: {option}"):
        Int8Embedding.from_float(embedding)


def test_state_dict_loads_and_refuses_another_dtype() -> None:
    layer, x = Int8Embedding.from_float(nn.Embedding(30, 8)), torch.arange(30)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert {n: (t.dtype, t.shape) for n, t in state.items()} == {
        "weight": (torch.int8, (30, 8)),
        "scale": (torch.float32, (30,)),
    }
    fresh = Int8Embedding(**layer.config())
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), layer(x))
    with pytest.raises(RuntimeError, match=r"weight is torch.float32, expected int8"):
        fresh.load_state_dict(nn.Embedding(30, 8).state_dict(), strict=False)


def test_copies_and_pickles() -> None:
    layer, x = Int8Embedding.from_float(nn.Embedding(30, 8).bfloat16()), torch.arange(30)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_changes_reach_the_result_alone(dtype: torch.dtype) -> None:
    layer, x = Int8Embedding.from_float(nn.Embedding(30, 8)), torch.arange(30)
    expected, scale = layer(x), layer.scale.clone()
    layer.to(dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), expected.to(dtype))
    assert torch.equal(layer.scale, scale)
    assert torch.equal(layer.float()(x), expected)


@pytest.mark.filterwarnings("ignore")  # torch's own, from tracing
def test_compiles_whole() -> None:
    model = nn.Sequential(Int8Embedding.from_float(nn.Embedding(30, 8)), nn.Linear(8, 4))
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randint(30, (3, 5))
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model[1].weight.grad.abs().sum() > 0


def test_padding_outside_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="padding_idx is 10"):
        Int8Embedding(10, 4, padding_idx=10)
