"""The example examples/distill_lm.py: its data, its measure, and that it runs and resumes."""

from __future__ import annotations

import importlib.util
import json
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = {
    *("teacher", "student alone", "+ probability distillation", "+ parameter distillation", "+ features"),
    *("then more of the same", "then reverse KL", "then reverse KL, on-policy"),
}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "distill_lm.py"
    spec = importlib.util.spec_from_file_location("distill_lm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["distill_lm"] = module  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def test_each_file_is_read_once_and_a_tenth_is_held_out(example: ModuleType) -> None:
    train, held_out = (bytes(text.numpy()) for text in example.texts())
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.2
    folder = Path(sysconfig.get_path("stdlib"))
    for name in ("json/decoder.py", "ast.py", "heapq.py", "logging/handlers.py", "bisect.py"):
        source = (folder / name).read_bytes() + b"\0"
        assert train.count(source) + held_out.count(source) == 1, name
    assert (folder / "encodings" / "cp1252.py").read_bytes() not in train + held_out


def test_windows_pair_each_byte_with_the_next(example: ModuleType) -> None:
    text = torch.arange(200, dtype=torch.uint8)
    loader = example.Windows(text, batch=5, batches=40)
    items = list(loader)
    assert len(items) == len(loader) == 40
    starts = torch.cat([ids[:, 0] for ids, _ in items])
    assert (int(starts.min()), int(starts.max())) == (0, 200 - example.CONTEXT - 1)  # no byte is never seen
    for ids, target in items:
        assert ids.shape == (5, example.CONTEXT)
        assert torch.equal(target, ids + 1)
        assert torch.equal(ids, ids[:, :1] + torch.arange(example.CONTEXT))


def test_model_sees_only_what_came_before(example: ModuleType) -> None:
    model = example.ByteModel(32, 2).double()
    ids = torch.randint(256, (1, 20))
    before = model(ids)
    for place in (0, 7, 19):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 1) % 256
        moved = (model(changed) - before).abs().amax(-1)[0] > 0
        assert moved.tolist() == [t >= place for t in range(20)]


class Always(nn.Module):
    """Expects the same of every byte."""

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__()
        self.log_p = nn.Parameter(probabilities.log())

    def forward(self, ids: Tensor) -> Tensor:
        return self.log_p.expand(*ids.shape, 256)


def test_bits_are_counted(example: ModuleType, tmp_path: Path) -> None:
    experiment = example.Experiment(example.QUICK, tmp_path, Console(quiet=True))
    assert experiment.bits(Always(torch.full((256,), 1 / 256))) == pytest.approx(8.0)
    counts = torch.bincount(experiment.windows[:, 1:].flatten(), minlength=256).double()
    p = counts / counts.sum()
    entropy = -(p * p.clamp(min=1e-9).log2()).sum()
    assert experiment.bits(Always(p.float().clamp(min=1e-9))) == pytest.approx(float(entropy), rel=1e-4)


def test_what_is_written_is_judged_by_the_teacher(example: ModuleType, tmp_path: Path) -> None:
    experiment = example.Experiment(example.QUICK, tmp_path, Console(quiet=True))
    a, b, c = (F.one_hot(torch.tensor(i), 256).float() for i in (97, 98, 99))
    rest = torch.full((256,), 1e-9)
    experiment.teacher = Always(0.25 * a + 0.5 * b + 0.25 * c + rest)
    half = Always(0.5 * a + 0.5 * b + rest)  # writes as many of both
    assert experiment.judge(Always(b + rest)) == pytest.approx((1.0, 1.0), abs=1e-3)
    assert experiment.judge(Always(a + rest)) == pytest.approx((2.0, 2.0), abs=1e-3)
    assert experiment.judge(half) == pytest.approx((1.5, 0.5), abs=1e-3)
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    experiment.judge(half)
    assert torch.rand(()) == expected


def test_each_byte_is_judged_after_those_that_were_written(example: ModuleType, tmp_path: Path) -> None:
    experiment = example.Experiment(example.QUICK, tmp_path, Console(quiet=True))
    teacher, student = example.ByteModel(32, 1).eval(), example.ByteModel(32, 2).eval()
    experiment.teacher = teacher
    found = experiment.judge(student)
    torch.manual_seed(0)
    prompts = experiment.windows[: example.QUICK.continuations, : example.PROMPT]
    sums, ids = torch.zeros(2, dtype=torch.float64), prompts
    with torch.no_grad():
        for _ in range(example.WRITTEN):  # the random numbers of generate, one draw per byte
            p, q = (model(ids)[:, -1].softmax(-1) for model in (student, teacher))
            ids = torch.cat((ids, p.multinomial(1)), 1)
            sums += torch.stack([-(p * q.log2()).sum(), (p * (p / q).log2()).sum()]).double()
    assert found == pytest.approx((sums / (len(prompts) * example.WRITTEN)).tolist(), rel=1e-4)


def tables(folder: Path) -> dict[str, dict[str, Any]]:
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {record["title"]: {row["name"]: row["runs"] for row in record["rows"]} for record in records}


def test_runs_and_goes_on(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["distill_lm.py", "--quick", "--seeds", "1", "--out", str(tmp_path)])
    example.main()
    found = tables(tmp_path)
    assert len(found) == len(list(tmp_path.glob("*.html"))) == 3
    for rows in found.values():
        assert set(rows) == ROWS
        assert all(0.0 <= run["value"] < 12.0 for runs in rows.values() for run in runs)
    (tmp_path / "then-reverse-kl-on-policy-0.pt").unlink()  # as if it had been interrupted before the last row
    begun = 0
    windows = example.Windows.__iter__

    def counted(self: Any) -> Any:
        nonlocal begun
        begun += 1
        return windows(self)

    monkeypatch.setattr(example.Windows, "__iter__", counted)
    example.main()
    assert tables(tmp_path) == found
    assert begun == 2  # the epochs of that row
