"""A teacher's outputs on disk: what is read is what the teacher says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cache_runs import everything, loader
from tests.distill_runs import CLASSES, FEATURES, ROWS, Teacher, data, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from potstill.distill import (
    DIST,
    Batch,
    Distiller,
    HiddenStates,
    LogitStandardisation,
    Outputs,
    SoftTargets,
    Strategy,
    TrainingPlan,
)
from potstill.distill.batch import TopK
from potstill.distill.cache import CachedTeacher, collate_indexed
from potstill.errors import CacheError

pytestmark = pytest.mark.usefixtures("one_thread")


class Tagger(nn.Module):
    """Takes tokens and a mask by name; returns logits for each token, and has layers of tokens and of maps."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.maps = nn.Conv2d(1, 3, 3)
        self.head = nn.Linear(8, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids) * mask.unsqueeze(-1)
        for layer in self.block:
            x = layer(x).relu()
        self.maps(x.unsqueeze(1))
        return {"logits": self.head(x)}


def sentences(rows: int = 9) -> list[tuple[dict[str, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(11, (rows, 5), generator=generator)
    return [({"ids": row, "mask": (row > 2).float()}, row % 7) for row in ids]


def teacher() -> nn.Module:
    return mlp(seed=9, hidden=16)


def live(model: nn.Module, batches: list[Any], layers: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's logits and its layers' outputs, caught by hooks of our own."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name in layers:
        model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: found[name].append(y))
    with torch.no_grad():
        logits = torch.cat([model(**x)["logits"] if isinstance(x, dict) else model(x) for x in batches])
    return logits, {name: torch.cat(parts) for name, parts in found.items()}


# --- what is read


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_and_layers_are_the_teachers(dtype: torch.dtype, workers: int, tmp_path: Path) -> None:
    model = Tagger().eval()
    cached = CachedTeacher(
        model, sentences(), tmp_path / "deep/cache", layers=["block.*", "maps"], dtype=dtype, batch_size=4
    )
    indices, logits, features = everything(cached, num_workers=workers)
    assert indices.tolist() == list(range(9))
    names = ["block.0", "block.1", "maps"]
    rows = [x for x, _ in sentences()]
    batches = [{k: torch.stack([x[k] for x in rows[i : i + 4]]) for k in ("ids", "mask")} for i in range(0, 9, 4)]
    expected, layers = live(model, batches, names)
    assert list(features) == names
    assert features["maps"].shape == (9, 3, 3, 6)
    for found, wanted in [(logits, expected), *((features[name], layers[name]) for name in names)]:
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted.to(dtype).float())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("classes", "index_bytes"), [(7, 1), (300, 2), (70_000, 4)])
def test_the_likeliest_classes(classes: int, index_bytes: int, temperature: float, tmp_path: Path) -> None:
    model = Tagger(classes).eval()
    cached = CachedTeacher(model, sentences(), tmp_path, top_k=3, temperature=temperature, dtype=torch.float32)
    assert cached.bytes_per_example == 4 + 5 * 3 * (4 + index_bytes) + (-5 * 3 * index_bytes) % 4
    _, top, _ = everything(cached)
    assert isinstance(top, TopK)
    assert top.temperature == temperature
    ids, mask = (torch.stack([x[name] for x, _ in sentences()]) for name in ("ids", "mask"))
    logits = model(ids, mask)["logits"].detach().double()
    expected, indices = (logits / temperature).log_softmax(-1).topk(3)
    assert torch.equal(top.indices, indices)
    torch.testing.assert_close(top.log_probs.double(), expected, rtol=1e-6, atol=1e-6)


def test_bytes_of_an_example(tmp_path: Path) -> None:
    one = CachedTeacher(Tagger(), sentences(), tmp_path / "half", layers="block.1")
    assert one.bytes_per_example == 4 + 2 * 5 * 7 + 2 * 5 * 8 + 2  # and 2 that align the next one
    assert (tmp_path / "half/outputs.bin").stat().st_size == 9 * one.bytes_per_example
    two = CachedTeacher(Tagger(), sentences(), tmp_path / "whole", dtype=torch.float32)
    assert two.bytes_per_example == 4 + 4 * 5 * 7


def test_classes_that_the_teacher_excludes_stay_excluded(tmp_path: Path) -> None:
    class Sure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(torch.arange(4) < 2, x.sum(-1, keepdim=True), -math.inf)

    _, logits, _ = everything(CachedTeacher(Sure(), data(), tmp_path))
    assert isinstance(logits, Tensor)
    assert (logits == -math.inf).sum(-1).unique().tolist() == [2]


def test_what_float16_lacks_is_refused(tmp_path: Path) -> None:
    large = nn.Sequential(mlp(), nn.Linear(CLASSES, CLASSES))
    large[1].weight.data.fill_(1e6)
    with pytest.raises(
        CacheError, match=r"logits has the value -?[\d.e+]+, beyond float16; cache with dtype=torch.bfl"
    ):
        CachedTeacher(large, data(), tmp_path / "half")
    _, logits, _ = everything(CachedTeacher(large, data(), tmp_path / "bfloat16", dtype=torch.bfloat16))
    assert isinstance(logits, Tensor)
    assert bool(logits.isfinite().all())


def test_a_collate_of_ones_own_and_parts_of_the_data(tmp_path: Path) -> None:
    def collate(rows: list[Any]) -> Any:
        return {"input": torch.stack([x for x, _ in rows])}, torch.stack([y for _, y in rows])

    class ByName(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * input

    cached = CachedTeacher(ByName(), data(), tmp_path, dtype=torch.float32, collate=collate)
    part = Subset(cached.dataset, [5, 40, 7])
    (item,) = DataLoader(part, batch_size=3, collate_fn=collate_indexed(collate))
    batch = Batch.of(item)
    assert batch.index is not None
    assert batch.index.tolist() == [5, 40, 7]
    assert batch.to(torch.device("cpu")).index is batch.index
    output, _ = cached.outputs(batch)
    assert isinstance(output, Tensor)
    assert torch.equal(output, 2 * data().tensors[0][[5, 40, 7]])
    assert torch.equal(batch.target, data().tensors[1][[5, 40, 7]])


# --- training


def term(strategy: Strategy, student: nn.Module, source: nn.Module, batch: Batch) -> list[Tensor]:
    """The gradients of a student's parameters, with a teacher or its cache."""
    strategy.attach(student, source)
    own, hooks = {}, []
    for name in strategy.student_layers():
        keep = student.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: own.update({name: y}))
        hooks.append(keep)
    answer = student(*batch.args)
    for hook in hooks:
        hook.remove()
    if isinstance(source, CachedTeacher):
        output, features = source.outputs(batch)
    else:
        output, features = live(source, list(batch.args), strategy.teacher_layers())
    loss = strategy(Outputs(batch, answer, output, own, features))
    return list(torch.autograd.grad(loss, list(student.parameters()), allow_unused=True))


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: SoftTargets(4.0, 0.7),
        lambda: SoftTargets(1.0, 1.0, divergence="reverse_kl"),
        lambda: HiddenStates(["0", "4"]),
        DIST,
        LogitStandardisation,
    ],
)
def test_a_step_is_that_of_the_teacher_itself(strategy: Callable[[], Strategy], tmp_path: Path) -> None:
    cached = CachedTeacher(teacher(), data(), tmp_path, layers=["0", "4"], dtype=torch.float32, batch_size=5)
    student = mlp(hidden=16)
    batch = Batch.of(next(iter(loader(cached, batch_size=16))))
    found = term(strategy(), student, cached, batch)
    wanted = term(strategy(), student, teacher(), batch)
    assert any(g is not None and float(g.abs().max()) > 1e-4 for g in wanted)
    for g, expected in zip(found, wanted, strict=True):
        assert (g is None) == (expected is None)
        if g is not None:
            torch.testing.assert_close(g, expected, rtol=1e-6, atol=1e-6)


def test_a_run_is_that_with_the_teacher_itself(tmp_path: Path) -> None:
    cached = CachedTeacher(teacher(), data(), tmp_path, layers="2", dtype=torch.float32)
    losses, students = [], []
    for source, dataset in ((teacher(), data()), (cached, cached.dataset)):
        batches = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=1)
        torch.manual_seed(3)
        students.append(mlp())
        strategies = [SoftTargets(2.0, 0.7), (0.5, HiddenStates("2"))]
        run = Distiller(source, students[-1], strategies, sample=next(iter(batches)))
        losses.append(run.fit(batches, TrainingPlan(epochs=2, lr=0.01, accumulate=2), quiet=True).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] < losses[0][0]
    for p, q in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("rest", ["tail", "renormalize", "partial"])
def test_all_classes_as_the_likeliest_are_the_logits(rest: str, temperature: float, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.float32}
    whole = CachedTeacher(teacher(), data(), tmp_path / "whole", **options)
    options |= {"top_k": CLASSES, "temperature": temperature}
    top = CachedTeacher(teacher(), data(), tmp_path / "top", **options)
    batch = Batch.of(next(iter(loader(top, batch_size=16))))
    wanted = term(SoftTargets(temperature, 0.7), mlp(), whole, batch)
    found = term(SoftTargets(temperature, 0.7, rest=rest), mlp(), top, batch)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_likeliest_classes_at_another_temperature(tmp_path: Path) -> None:
    cached = CachedTeacher(teacher(), data(), tmp_path, top_k=2, dtype=torch.float32)
    batch = Batch.of(next(iter(loader(cached, batch_size=16))))
    top, _ = cached.outputs(batch)
    student = torch.randn(16, CLASSES)
    loss = SoftTargets(4.0, 1.0, rest="renormalize")(Outputs(batch, student, top))
    z = teacher()(*batch.args).detach().double()
    values, indices = z.topk(2)
    p = (values / 4).softmax(-1)
    q = (student.double() / 4).log_softmax(-1).gather(-1, indices)
    assert float(loss) == pytest.approx(16 * float((p * (p.log() - q)).sum(-1).mean()), rel=1e-5)
    for rest in ("tail", "partial"):
        with pytest.raises(
            ValueError, match=r"temperature is 4.0, but .* cached at 1.0, .* Cache with temperature=4.0"
        ):
            SoftTargets(4.0, 1.0, rest=rest)(Outputs(batch, student, top))


def test_other_strategies_need_all_logits(tmp_path: Path) -> None:
    cached = CachedTeacher(teacher(), data(), tmp_path, top_k=2)
    batch = Batch.of(next(iter(loader(cached))))
    top, _ = cached.outputs(batch)
    with pytest.raises(TypeError, match=r"only the 2 likeliest classes of the teacher were cached, .* top_k=None"):
        DIST()(Outputs(batch, torch.randn(4, CLASSES), top))


def test_the_rest_is_in_the_config_if_it_is_chosen() -> None:
    assert "rest" not in SoftTargets().config()
    assert SoftTargets(**SoftTargets(rest="partial").config()).config()["rest"] == "partial"
    with pytest.raises(ValueError, match="rest is 'head'; expected one of tail, renormalize, partial"):
        SoftTargets(rest="head")


# --- the teacher


def test_the_teacher_runs_once_for_each_example_and_stays_as_it_was(tmp_path: Path) -> None:
    model = Teacher()
    model.model[1].eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cached = CachedTeacher(model, data(), tmp_path, layers="model.0", batch_size=ROWS // 4)
    assert model.calls == 1 + 4  # the first batch tells the shapes
    everything(cached)
    again = CachedTeacher(model, data(), tmp_path, layers="model.0")
    everything(again)
    assert model.calls == 1 + 4
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_it_is_in_evaluation_mode(tmp_path: Path) -> None:
    model = mlp(seed=9, dropout=0.5, norm=True).train()
    _, logits, _ = everything(CachedTeacher(model, data(), tmp_path, dtype=torch.float32))
    torch.testing.assert_close(logits, model.eval()(data().tensors[0]))
    assert int(model[1].num_batches_tracked) == 0


def test_open_needs_no_teacher(tmp_path: Path) -> None:
    cached = CachedTeacher(teacher(), data(), tmp_path, layers=["0", "4"], dtype=torch.float32)
    opened = CachedTeacher.open(tmp_path, data())
    for one, other in zip(everything(cached)[1:], everything(opened)[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert repr(opened) == repr(cached)
    assert "layers=['0', '4']" in repr(opened)
    assert [name for name, _ in opened.named_modules()] == ["", "0", "4"]
    assert not list(cached.parameters())
    with pytest.raises(TypeError, match="cannot be run on inputs"):
        opened(torch.zeros(1, FEATURES))


def test_a_layer_that_is_not_held(tmp_path: Path) -> None:
    cached = CachedTeacher(teacher(), data(), tmp_path, layers=["0", "4"])
    with pytest.raises(ValueError, match=r"no module of the teacher is named '2'.* Among its modules are [04], [04]$"):
        HiddenStates("0", "2").attach(mlp(), cached)


# --- costs


class Numbers(Dataset[tuple[Tensor, int]]):
    """Made when they are read, so that only the cache is large."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([float(index)]), 0


class Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(4096.0)


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def test_memory_does_not_grow_with_what_is_read(tmp_path: Path) -> None:
    cached = CachedTeacher(Wide(), Numbers(), tmp_path, dtype=torch.float32)
    size = (tmp_path / "outputs.bin").stat().st_size
    assert size > 64e6
    order = torch.randperm(4096).split(32)
    grown = []
    for indices in order:
        batch = Batch((indices.float().unsqueeze(1),), {}, indices, indices)
        output, _ = cached.outputs(batch)
        assert isinstance(output, Tensor)
        assert torch.equal(output, Wide()(batch.args[0]))
        grown.append(resident())
    assert max(grown) - grown[0] < size / 8


def test_reading_is_quick(tmp_path: Path) -> None:
    """Far below what it does, 1 GB/s and more, but far above what reading number by number would."""
    cached = CachedTeacher(Wide(), Numbers(), tmp_path)
    batches = [Batch((i.float().unsqueeze(1),), {}, i, i) for i in torch.randperm(4096).split(64)]
    begin = time.perf_counter()
    for batch in batches:
        cached.outputs(batch)
    assert 4096 * cached.bytes_per_example / (time.perf_counter() - begin) > 20e6
