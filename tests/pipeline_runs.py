"""What the tests of pipelines run. As a program: one rank, which writes what it found into a file."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

import potstill
from potstill.nn import KDLoss
from potstill.parallel import faults
from potstill.parallel.pipeline import Pipeline
from potstill.parallel.stages import stages

ROWS, CLASSES, WORDS, LENGTH = 12, 5, 50, 7
SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}

Loss = Callable[[Any, Any], Tensor]
Case = tuple[nn.Module, Any, Any, Loss]  # a model, its inputs, the targets, the loss


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(layers: int = 4, last: nn.Module | None = None) -> nn.Sequential:
    """With activations that overwrite their input."""
    torch.manual_seed(1)
    middle = [m for _ in range(layers) for m in (nn.Linear(8, 8), nn.ReLU(inplace=True), nn.LayerNorm(8))]
    return nn.Sequential(nn.Linear(6, 8), *middle, last or nn.Linear(8, CLASSES))


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 6, generator=seeded(2)), torch.randint(CLASSES, (ROWS,), generator=seeded(3))


def words() -> dict[str, Tensor]:
    ids = torch.randint(3, WORDS, (ROWS, LENGTH), generator=seeded(4))
    mask = torch.ones_like(ids)
    mask[::3, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def of_logits(output: Any, target: Any) -> Tensor:
    return cross_entropy(output.logits.flatten(0, -2), target.flatten())


class Looped(nn.Module):
    """A parameter of the model itself, used before and after its layers: all ranks hold it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.shift = nn.Parameter(torch.randn(8))
        self.first = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        x = self.first(x) + self.shift
        for layer in self.layers:
            x = layer(x)
        return self.head(scale * (x - 0.5 * self.shift))


def cases() -> dict[str, Callable[[], Case]]:
    def bert(**changes: Any) -> nn.Module:
        import transformers

        torch.manual_seed(5)
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(vocab_size=WORDS, num_labels=CLASSES, **{**SIZES, **changes})
        )

    def gpt2() -> Case:
        import transformers

        torch.manual_seed(5)
        config = transformers.GPT2Config(
            vocab_size=WORDS, n_embd=16, n_layer=4, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config), words(), words()["input_ids"], of_logits

    def llama() -> Case:
        import transformers

        torch.manual_seed(5)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=WORDS, **SIZES))
        return model, words(), words()["input_ids"], of_logits

    def encoder() -> Case:
        torch.manual_seed(5)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        x = torch.randn(ROWS, LENGTH, 8, generator=seeded(7))
        return nn.TransformerEncoder(layer, 4, nn.LayerNorm(8)), x, x.roll(1), lambda y, t: (y - t).square().mean()

    def taught() -> Case:
        """Labels and the teacher's top k, and row numbers to look up more."""
        x, y = rows()
        found = torch.randn(ROWS, CLASSES, generator=seeded(8)).log_softmax(-1).topk(2)
        weights = torch.linspace(0.5, 1.5, ROWS)

        def loss(output: Tensor, target: Any) -> Tensor:
            labels, (log_probs, indices), numbers = target["labels"], target["teacher"], target["rows"]
            options = {"teacher_indices": indices, "row_weight": weights[numbers]}
            return KDLoss(alpha=0.5)(output, log_probs, labels, **options)

        return mlp(), x, {"labels": y, "teacher": tuple(found), "rows": torch.arange(ROWS)}, loss

    def int8(frozen_first: bool) -> Case:
        model = bert(hidden_size=32) if frozen_first else bert()
        report = potstill.quantize_(model, exclude="classifier", only_if_faster=False, sample_input=words())
        assert {row.action for row in report.rows} >= {"int8"}
        if frozen_first:
            model.bert.requires_grad_(False)
        return model, words(), rows()[1], of_logits

    return {
        "mlp": lambda: (mlp(), *rows(), cross_entropy),
        "looped": lambda: (Looped(), {"x": rows()[0], "scale": 2.0}, rows()[1], cross_entropy),
        "several targets": taught,
        "bert": lambda: (bert(), words(), rows()[1], of_logits),
        "gpt2, tied": gpt2,
        "llama": llama,
        "encoder": encoder,
        "int8 bert": lambda: int8(False),
        "frozen int8 bert": lambda: int8(True),
    }


SCHEDULES = (("gpipe", 1), ("gpipe", 2), ("gpipe", 3), ("1f1b", 2), ("1f1b", 4), ("interleaved", 1), ("interleaved", 4))
ONE_EACH = (("1f1b", 4), ("gpipe", 4), ("interleaved", 2))


def runs(ranks: int) -> list[tuple[str, str, int]]:
    """The case, schedule and micro-batches of each run."""
    some = [name for name in cases() if name != "mlp"] if ranks == 2 else ["looped"]
    every = [("mlp", schedule, count) for schedule, count in SCHEDULES if schedule != "1f1b" or count >= ranks]
    return [*every, *((name, schedule, count) for name in some for schedule, count in ONE_EACH)]


def cut(model: nn.Module, x: Any, schedule: str, ranks: int) -> Any:
    return stages(model, ranks * (2 if schedule == "interleaved" else 1), x)


def called(model: nn.Module, x: Any) -> Any:
    return model(**x) if isinstance(x, dict) else model(x)


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def error(found: Tensor | None, wanted: Tensor | None, least: float = 1e-12) -> float:
    """Relative to the norm of what is wanted, or to ``least`` if that is more; a gradient that is missing is 0."""
    if found is None or wanted is None:
        return float(any(x is not None and bool(x.any()) for x in (found, wanted)))
    value = float((found - wanted).norm()) / max(float(wanted.norm()), least)
    return math.inf if math.isnan(value) else value  # a maximum may lose a NaN


def against_whole(case: Case, schedule: str, micro_batches: int) -> dict[str, Any]:
    """Two steps, whose gradients add up, and the output, beside those of the model in one piece."""
    model, x, target, loss = case
    model.eval()
    whole = copy.deepcopy(model)
    found = Pipeline(
        model, cut(model, x, schedule, dist.get_world_size()), schedule=schedule, micro_batches=micro_batches
    )
    losses = [found.step(x, target, loss) for _ in range(2)]
    output = called(whole, x)
    wanted = loss(output, target)
    (2.0 * wanted).backward()
    gradients = {name: p.grad for name, p in whole.named_parameters(remove_duplicate=False)}
    # The gradient of the bias of attention's keys is 0 but for rounding, which is nothing to compare with.
    least = 1e-3 * float(torch.nn.utils.get_total_norm([g for g in gradients.values() if g is not None]))
    errors = {name: error(p.grad, gradients[name], least) for name, p in found.module.named_parameters()}
    everywhere = logits(found(x, everywhere=True))
    last = found(x)
    assert (last is None) == (dist.get_rank() < dist.get_world_size() - 1)
    return {
        "loss": max(abs(value / float(wanted.detach()) - 1.0) for value in losses),
        "gradients": max(errors.values()),
        "trained": sum(gradients[name] is not None for name in errors),
        "output": error(everywhere, logits(output).detach()),
        "tensors": sorted(found.module.state_dict()),
        "whole": sorted(model.state_dict()),
        "same": all(torch.equal(value, model.state_dict()[key]) for key, value in found.module.state_dict().items()),
    }


def batch_norm() -> dict[str, Any]:
    """Its statistics after two steps beside those of the micro-batches in one process."""
    x, y = rows()
    model = mlp(1, nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, CLASSES)))
    whole = copy.deepcopy(model)
    found = Pipeline(model, [["0"], ["1", "2", "3", "4"]], micro_batches=3)
    for _ in range(2):
        found.step(x, y, cross_entropy)
        for part in x.chunk(3):
            whole(part)
    module = found.module.get_submodule("4")
    if dist.get_rank() == 0:
        return {"held": sorted(found.module.state_dict())}
    mine, wanted = module[0], whole[4][0]
    return {
        "error": error(mine.running_var, wanted.running_var) + error(mine.running_mean, wanted.running_mean),
        "batches": int(mine.num_batches_tracked),
    }


class Dropping(nn.Module):
    """Its own code drops, by its own flag."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return dropout(x, 0.5, self.training)


def modes() -> dict[str, Any]:
    torch.manual_seed(0)
    model, (x, _) = Dropping(), rows()
    found = Pipeline(model, stages(model, 2, x), micro_batches=2)
    dropped = found(x, everywhere=True)
    found.module.eval()
    return {
        "train": int((dropped == 0).sum()),
        "eval": bool(torch.equal(found(x, everywhere=True), model.eval()(x))),
        "smaller batch": bool(torch.equal(found(x[:4], everywhere=True), model(x[:4]))),
    }


def outcome(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"


class Telling(nn.Module):
    """Returns what no micro-batches can be joined of."""

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x, "done"


class FailingError(Exception):
    pass


class Failing(nn.Module):
    """Fails for rows that begin with a number above 9."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x[:, 0] > 9.0).any()):
            raise FailingError("too large")
        return x


def refusals(rank: int) -> dict[str, Any]:
    model, (x, y) = mlp(), rows()
    names = stages(model, 2, x)
    found = Pipeline(model, names, micro_batches=4)
    calls: list[int] = []

    def failing(output: Tensor, target: Tensor) -> Tensor:
        calls.append(len(calls))
        if len(calls) == 3:
            raise FailingError("the third micro-batch")
        return cross_entropy(output, target)

    def made(names: Any = names, **changes: Any) -> Any:
        return outcome(lambda: Pipeline(model, names, **{"micro_batches": 2, **changes}))

    odd = x.clone()
    odd[5, 0] = 10.0
    telling = Pipeline(nn.Sequential(mlp(), Telling()), [["0"], ["1"]], micro_batches=2)
    checked = nn.Sequential(Failing(), *mlp())
    first = Pipeline(checked, stages(checked, 2, x), micro_batches=4)
    return {
        "rows": outcome(lambda: found.step(x[:10], y[:10], cross_entropy)),
        "inputs": outcome(lambda: found.step([x], y, cross_entropy)),
        "loss": outcome(lambda: found.step(x, y, failing)),
        "loss of rows": outcome(lambda: found.step(x, y, lambda output, _: output.sum(1))),
        "after that": outcome(lambda: found.step(x, y, cross_entropy) - float(cross_entropy(model(x), y).detach())),
        "first stage": outcome(lambda: first.step(odd, y, cross_entropy)),
        "first stage, first batch": outcome(lambda: first.step(odd[4:], y[4:], cross_entropy)),
        "output": outcome(lambda: telling(x, everywhere=True)),
        "schedule": made(schedule="dualpipe"),
        "count": made(names[:1]),
        "micro-batches": made(micro_batches=1),
        "interleaved": made(cut(model, x, "interleaved", 2), schedule="interleaved", micro_batches=5),
        "unknown": made([["0"], ["99"]]),
        "inside": made([["4", ""], ["5"]]),
        "other stages": made([["0"], ["1"]] if rank else [["0"], ["2"]]),
        "one is wrong": made(micro_batches=2 if rank else 0),
        "not to be cut": outcome(lambda: stages(nn.Linear(6, 6), 2, x)),
        "part alone": outcome(lambda: found.module(x)),
    }


def leaving(leave: Callable[[], object]) -> None:
    """The last rank leaves in the middle of a step."""
    model, x, y, loss = cases()["mlp"]()

    def left(output: Tensor, target: Tensor) -> Tensor:
        leave()
        return loss(output, target)

    faults._ANSWER = 1.0  # seconds; one rank of two need not be waited for longer
    Pipeline(model, stages(model, 2, x), micro_batches=2).step(x, y, left)


def write(found: dict[str, Any], results: str) -> None:
    with open(results, "w") as file:
        json.dump(found, file)


def main(rank: int, ranks: int, meeting: str, results: str) -> None:
    """Everything above that these ranks are for, in an order that they share; what comes of it goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=timedelta(seconds=20)
    )
    found: dict[str, Any] = {}
    for name, schedule, count in runs(ranks):
        run = outcome(lambda case=name, how=(schedule, count): against_whole(cases()[case](), *how))
        found[f"{name}, {schedule} {count}"] = run
    if ranks == 2:
        found |= {"batch norm": outcome(batch_norm), "modes": outcome(modes), "refusals": refusals(rank)}
    if ranks == 2 and rank == 0:
        found["left alone"] = outcome(lambda: leaving(lambda: None))
    write(found, results)
    if ranks == 2 and rank == 1:
        leaving(lambda: os._exit(0))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
