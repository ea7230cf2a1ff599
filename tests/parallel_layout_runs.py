"""What the tests of plans run on two and on four processes. As a program: one rank, which runs it all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.parallel_models import CLASSES, MODELS, PADDING, WIDTH, Tokenwise, data, plain
from torch import Tensor, nn

from potstill.nn import Int8Linear, SparseLinear
from potstill.parallel import Plan, vocab_parallel_kd_loss
from potstill.parallel.pipeline import Pipeline
from potstill.transform.realise import realise_
from wire import Wire

MAX_NORM = 0.25

PLANS = {
    2: ("dp=2", "dp=2,shard", "tp=2", "pp=2,micro=2"),
    4: ("dp=2,tp=2", "dp=2,tp=2,shard", "tp=4", "dp=2,pp=2,micro=2", "dp=2,pp=2,shard,micro=2", "tp=2,pp=2"),
}
"""By the number of processes."""

SHARED = "dp=2,tp=2,shard", "dp=2,shard"
"""Under which plan a model is trained and saved, by four, and under which it is loaded, by two."""


HEADS_OF = {"bert": "cls.predictions.decoder", "gpt2": "lm_head", "llama": "lm_head"}


def models_of(world: int, plan: Plan) -> list[str]:
    """Those that are run under a plan: not all by four processes, which share two cores."""
    if world == 2:
        return ["plain", "int8"] if plan.pipeline > 1 else list(MODELS)
    if plan.pipeline > 1 or plan.tensor == 4:
        return ["int8"]
    return ["plain", "int8"] if plan.shard else ["plain", "sparse"]


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), y.flatten())


def applied(name: str, plan: Plan, **options: Any) -> Any:
    return plan.apply(MODELS[name](), data()[0][: plan.micro_batches or plan.pipeline], **options)


def run(name: str, plan: Plan) -> dict[str, Any]:
    """Loss and gradients under the plan, whole; then another model's state, loaded and given back, and its outputs."""
    model = applied(name, plan)
    x, y = plan.share(data())
    found: dict[str, Any] = {}
    if isinstance(model, Pipeline):
        found["loss"] = torch.tensor(model.step(x, y, cross_entropy))
        parameters = list(model.module.parameters())
    else:
        with Wire() as wire:
            loss = cross_entropy(logits_of(model, x), y)
            loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        found |= {"loss": total / plan.devices, "sent": wire.sent}
        parameters = list(model.parameters())
    found["norm"] = plan.clip_grad_norm_(model, MAX_NORM)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.copy_(parameter.grad)
    found["gradients"] = plan.full_state_dict(model)
    other = MODELS[name](seed=4).state_dict()
    if not isinstance(model, Pipeline):
        with torch.no_grad():  # FSDP leaves gathered parameters behind: what is loaded must not go away with them
            model(x)
    plan.load_full_state_dict(model, other)
    again = plan.full_state_dict(model)
    found["state"] = again.keys() == other.keys() and all(torch.equal(again[key], other[key]) for key in other)
    with torch.inference_mode():
        found["output"] = model(x, everywhere=True) if isinstance(model, Pipeline) else logits_of(model, x)
    return found


def vocabulary(name: str) -> dict[str, Any]:
    """Loss and gradients with embedding, head and loss split by vocabulary; some tokens are padding."""
    plan = Plan(tensor=2)
    model = applied(name, plan, head=HEADS_OF[name])
    x, y = padded()
    logits = logits_of(model, x)
    loss = vocab_parallel_kd_loss(logits, logits.detach(), y, alpha=0.0)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.copy_(parameter.grad)
    whole = plan.full_state_dict(model)
    return {"loss": loss.detach(), "gradients": whole, "columns": logits.shape[-1], "table": plan.describe(model)}


def padded() -> tuple[Tensor, Tensor]:
    """With tokens that are padding, and the one that has its number in the share of the second of two ranks."""
    x, y = data()
    x[:, 1], x[:, 2] = PADDING, PADDING - -(-CLASSES // 2)
    return x, y


def trained(plan: Plan) -> nn.Module:
    """After two steps of an optimiser."""
    model = applied("plain", plan) if plan.devices > 1 else MODELS["plain"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = plan.share(data())
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def quarter() -> list[float]:
    """Bytes gathered for blocks of float and of int8 layers."""
    gathered = []
    for convert in (nn.Identity(), Int8Linear.from_float):
        torch.manual_seed(0)
        layers = (nn.Linear(256, 256, bias=False).requires_grad_(False) for _ in range(2))
        model = nn.Sequential(*(nn.Sequential(convert(layer), nn.ReLU()) for layer in layers))
        model = Plan(data=2, shard=True).apply(model)
        with Wire() as wire, torch.no_grad():
            model(torch.zeros(2, 256))
        gathered.append(wire.gathered)
    return gathered


def realised() -> dict[str, Any]:
    """Masked layers that are split, and then made sparse on each rank."""
    plan = Plan(tensor=2)
    model = applied("masked", plan)
    x = data()[0]
    realise_(model, x, "float", only_if_faster=False)
    with torch.no_grad():
        return {"output": model(x), "state": plan.full_state_dict(model), "table": plan.describe(model)}


def narrow() -> dict[str, bool]:
    """Whether the state of models in bfloat16 and float64 goes in and comes out as it is."""
    found = {}
    for name, dtype in (("int8", torch.bfloat16), ("masked", torch.float64)):
        for text in ("tp=2", "dp=2,shard"):
            plan = Plan.parse(text)
            model = plan.apply(MODELS[name]().to(dtype), data()[0][:2])
            other = MODELS[name](seed=4).to(dtype).state_dict()
            plan.load_full_state_dict(model, other)
            again = plan.full_state_dict(model)
            found[f"{name} {text}"] = all(
                again[key].dtype == other[key].dtype and torch.equal(again[key], other[key]) for key in other
            )
    return found


def positions() -> dict[str, Any]:
    """Contiguous pieces of the sequence on two ranks."""
    plan = Plan(sequence=2)
    torch.manual_seed(0)
    model = plan.apply(Tokenwise(), data()[0][:2])
    x, y = plan.share(data())
    cross_entropy(model(x), y).backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    return {"x": x, "gradients": gradients}


def failures(rank: int) -> dict[str, Callable[[], object]]:
    """What must raise on both ranks, though only one of them may be at fault."""
    sample = data()[0][:2]
    split = Plan(tensor=2)
    sharded = Plan(data=2, shard=True)
    column = {"blocks.*.attention.q": "column"}

    def load(plan: Plan, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
        model = applied(name, plan)
        state = MODELS[name]().state_dict()
        change(state)
        plan.load_full_state_dict(model, state)

    def other_blocks(state: dict[str, Tensor]) -> None:
        layer = SparseLinear.from_float(nn.Linear(WIDTH, WIDTH)).state_dict()
        state.update({f"blocks.0.attention.q.{key}": value for key, value in layer.items()})

    return {
        "world": lambda: Plan(data=3).apply(plain(), sample),
        "weights": lambda: split.apply(plain(seed=3 + rank), sample),
        "sample of one": lambda: split.apply(plain(), sample if rank else sample.float()),
        "no sample": lambda: split.apply(plain()),
        "half a pair": lambda: split.apply(plain(), sample, tensor_plan=column),
        "role": lambda: split.apply(plain(), sample, tensor_plan={"blocks.*.up": "left"}),
        "head": lambda: split.apply(plain(), sample, head="tail"),
        "positions": lambda: Plan(sequence=2).apply(plain(), sample),
        "rows": lambda: Plan(data=2).share(torch.zeros(3)),
        "missing": lambda: load(split, "int8", lambda state: state.pop("blocks.0.up.weight")),
        "unknown": lambda: load(split, "int8", lambda state: state.update(more=torch.zeros(1))),
        "shape": lambda: load(sharded, "plain", lambda state: state.update({"norm.weight": torch.zeros(3)})),
        "blocks": lambda: load(sharded, "sparse", other_blocks),
        "not applied": lambda: split.full_state_dict(plain()) and split.describe(plain()),
    }


def outcome(what: Callable[[], Any]) -> Any:
    try:
        return what()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"


def tasks(rank: int, world: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """By name, in an order that all ranks share."""
    found: dict[str, Callable[[], Any]] = {}
    for text in PLANS[world]:
        plan = Plan.parse(text)
        found |= {f"{text} {name}": partial(run, name, plan) for name in models_of(world, plan)}
    if world == 4:
        return found | {"saved": partial(save_trained, folder)}
    found |= {f"vocabulary {name}": partial(vocabulary, name) for name in HEADS_OF}
    found |= {
        "quarter": quarter,
        "positions": positions,
        "realised": realised,
        "narrow": narrow,
        "loaded": partial(load_trained, folder),
    }
    return found | {f"fails: {name}": run for name, run in failures(rank).items()}


def save_trained(folder: Path) -> Tensor:
    """Four processes train and save."""
    plan = Plan.parse(SHARED[0])
    model = trained(plan)
    state = plan.full_state_dict(model, rank0_only=True)
    if dist.get_rank() == 0:
        torch.save(state, folder / "trained.pt")
    with torch.no_grad():
        return model(data()[0]).detach()


def load_trained(folder: Path) -> Tensor:
    """Two load what four have saved."""
    plan = Plan.parse(SHARED[1])
    model = applied("plain", plan)
    plan.load_full_state_dict(model, torch.load(folder / "trained.pt"))
    with torch.no_grad():
        return model(data()[0]).detach()


def main(rank: int, folder: Path) -> None:
    """Four processes first; then the first two of them alone, which load what four have saved."""
    torch.set_num_threads(1)
    for world in (4, 2):
        if rank < world:
            meeting = f"file://{folder}/meeting{world}"
            options: dict[str, Any] = {"rank": rank, "world_size": world, "timeout": timedelta(seconds=30)}
            dist.init_process_group("gloo", init_method=meeting, **options)
            found = {name: outcome(task) for name, task in tasks(rank, world, folder).items()}
            torch.save(found, folder / f"{world}.{rank}.pt")
            dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
