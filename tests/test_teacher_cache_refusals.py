"""A teacher's outputs on disk: other teachers, other examples and what cannot be held are refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.cache_runs import everything
from tests.distill_runs import FEATURES, Teacher, data, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from potstill.distill import Batch, CachedTeacher, collate_indexed
from potstill.errors import CacheError

pytestmark = pytest.mark.usefixtures("one_thread")


def teacher() -> nn.Module:
    return mlp(seed=9, hidden=16)


# --- the folder is another's


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": mlp(seed=8, hidden=16)}, r"teacher is [0-9a-f]{32} in it and [0-9a-f]{32} here"),
        ({"dataset": data(40)}, "examples is 44 in it and 40 here"),
        ({"top_k": 2}, "top_k is None in it and 2 here"),
        ({"dtype": torch.float32}, "dtype is float16 in it and float32 here"),
        ({"layers": ["0", "2"]}, r"layers is \('0',\) in it and \('0', '2'\) here"),
    ],
)
def test_a_folder_with_another_cache(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"teacher": teacher(), "dataset": data(), "folder": tmp_path, "layers": "0"}
    CachedTeacher(**arguments)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(CacheError, match=f"{message}.*Use the same teacher, data set and arguments, give another fold"):
        CachedTeacher(**{**arguments, **change})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float64}, "dtype is torch.float64; expected torch.float16, bfloat16 or float32"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"temperature": 0.0, "top_k": 1}, "temperature is 0.0; expected a positive number"),
        ({"temperature": 2.0}, "temperature is 2.0, but logits have none; give top_k too"),
        ({"dataset": []}, "the data set is empty"),
        ({"layers": "5"}, "no module of the teacher is named '5'"),
        ({"top_k": 5}, "k is 5; expected 1 to 4, the number of classes"),
        ({"top_k": 0}, "k is 0; expected 1 to 4, the number of classes"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        CachedTeacher(**{"teacher": teacher(), "dataset": data(), "folder": tmp_path, **arguments})
    assert not list(tmp_path.iterdir())


# --- the examples are others


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Changes a number of an example whenever that is read: of all, or of ``only`` one."""

    def __init__(self, only: int | None = None) -> None:
        self.rows = data()
        self.only = only

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.rows[index]
        x = x.clone()
        if self.only in (None, index):
            x[random.randrange(len(x))] += random.random()
        return x, y


OTHER = "have other values than when they were cached.*Take random augmentation out of the data set"


def test_augmentation_is_seen_after_the_first_chunk(tmp_path: Path) -> None:
    model = Teacher()
    with pytest.raises(CacheError, match=OTHER):
        CachedTeacher(model, Augmented(), tmp_path, batch_size=1)
    assert model.calls == 1 + 16  # of 44


def test_augmentation_is_seen_where_it_is_rare(tmp_path: Path) -> None:
    CachedTeacher(teacher(), data(), tmp_path)
    with pytest.raises(CacheError, match=f"the inputs of 1 of 44 examples, such as example 20, {OTHER}"):
        everything(CachedTeacher.open(tmp_path, Augmented(only=20)), batch_size=44)


def test_another_data_set_of_the_same_length(tmp_path: Path) -> None:
    CachedTeacher(teacher(), data(), tmp_path)
    x, y = data().tensors
    with pytest.raises(CacheError, match=OTHER):
        CachedTeacher(teacher(), TensorDataset(x.flip(0), y), tmp_path)
    with pytest.raises(CacheError, match=OTHER):
        CachedTeacher.open(tmp_path, TensorDataset(x.flip(0), y))
    within = x.clone()
    within[[20, 21]] = within[[21, 20]]
    opened = CachedTeacher.open(tmp_path, TensorDataset(within, y))
    with pytest.raises(CacheError, match=rf"the inputs of 2 of 44 examples, such as example 2[01], {OTHER}"):
        everything(opened, batch_size=44)


def test_other_targets_are_no_other_examples(tmp_path: Path) -> None:
    CachedTeacher(teacher(), data(), tmp_path)
    x, y = data().tensors
    everything(CachedTeacher.open(tmp_path, TensorDataset(x, 1 + y)))


def test_mixtures_in_the_loader_are_seen(tmp_path: Path) -> None:
    cached = CachedTeacher(teacher(), data(), tmp_path)

    def mixed(rows: list[Any]) -> Any:
        x = torch.stack([x for x, _ in rows])
        return 0.9 * x + 0.1 * x.flip(0), torch.stack([y for _, y in rows])

    with pytest.raises(CacheError, match=OTHER):
        everything(cached, collate_fn=collate_indexed(mixed))


@pytest.mark.parametrize("change", [lambda x: x.double(), lambda x: x.unsqueeze(1), lambda x: x[:, 1:]])
def test_examples_prepared_in_another_way(change: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    x, y = data().tensors
    CachedTeacher(teacher(), data(), tmp_path)
    message = (
        r"inputs of an example are \{'0': .*\}, but those of the cached ones are \{'0': 'float32 \[6\]'\}. Pad all"
    )
    with pytest.raises(CacheError, match=message):
        CachedTeacher.open(tmp_path, TensorDataset(change(x), y))


def test_a_loader_over_the_data_set_itself(tmp_path: Path) -> None:
    cached = CachedTeacher(teacher(), data(), tmp_path)
    batch = Batch.of(next(iter(DataLoader(data(), batch_size=4))))
    with pytest.raises(
        TypeError, match=r"does not tell which examples it has; the loader must be made over cached.data"
    ):
        cached.outputs(batch)
    for wrong in (44, -1):
        with pytest.raises(IndexError, match=rf"the batch has the examples \[{wrong}\]; the cache has 44"):
            cached.outputs(Batch(batch.args, {}, batch.target, torch.tensor([wrong])))


def test_examples_of_several_lengths_are_refused(tmp_path: Path) -> None:
    rows = [(torch.zeros(3 if i < 8 else 4, FEATURES), torch.tensor(0)) for i in range(12)]
    with pytest.raises(CacheError, match=r"the examples 6 to 8 do not make a batch \(.*pad them to one length"):
        CachedTeacher(teacher(), rows, tmp_path / "torch's", batch_size=3)

    def padded(items: list[Any]) -> Any:
        longest = max(len(x) for x, _ in items)
        return torch.stack([F.pad(x, (0, 0, 0, longest - len(x))) for x, _ in items]), torch.zeros(len(items))

    with pytest.raises(
        CacheError, match=r"inputs of an example are .*4, 6.*, but .*3, 6.* Pad all examples to one leng"
    ):
        CachedTeacher(teacher(), rows, tmp_path / "own", batch_size=4, collate=padded)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Flatten(0), r"logits has the shape \[24\] for 4 examples; its first dimension must be the examples"),
        (nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), r"logits has the shape \[4\] for 4 examples"),
        (nn.LSTM(6, 2), r"layer:body has the shape"),
    ],
)
def test_outputs_without_a_batch_are_refused(model: nn.Module, message: str, tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if not isinstance(model, nn.LSTM) else self.body(x.reshape(2, -1, 6))[0].reshape(-1, 2)

    with pytest.raises(CacheError, match=message):
        CachedTeacher(Around(), data(), tmp_path, layers="body", batch_size=4)
