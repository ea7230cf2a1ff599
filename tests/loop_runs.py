"""The training runs in other people's loops that test_loops.py watches. As a program: one of several processes."""

from __future__ import annotations

import gc
import importlib.util
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from potstill.distill import Distiller, HardLabels, HiddenStates, SoftTargets, TrainingPlan, schedules

FEATURES, CLASSES, ROWS, BATCH, EPOCHS = 6, 4, 24, 4, 3
WORDS, LENGTH = 30, 5
LR = 2e-2  # the examples' own
TWO_PROCESSES = EPOCHS * ROWS // (2 * BATCH)  # steps
Weights = dict[str, Tensor]


def example(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "loops" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"loops_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(ROWS, FEATURES, generator=generator), torch.randint(CLASSES, (ROWS,), generator=generator)
    )


def loader(batch: int = BATCH) -> DataLoader:
    return DataLoader(data(), batch_size=batch)


def distiller(steps: int) -> Distiller:
    """Everything that a loop can get wrong: a weight that depends on the step, a projection, labels and a teacher."""

    def mlp(seed: int, hidden: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Dropout(0.0), nn.Linear(hidden, CLASSES))

    teacher, student = mlp(1, 16), mlp(2, 8)
    teacher.insert(2, nn.Dropout(0.5))  # noise, unless the teacher is in evaluation mode
    strategies = [HardLabels(), (schedules.linear(1.0, 0.0, steps), SoftTargets(2.0, 1.0)), (0.5, HiddenStates("1"))]
    torch.manual_seed(3)
    return Distiller(teacher, student, strategies, sample=next(iter(loader())))


def weights(trained: Distiller) -> Weights:
    found = nn.ModuleDict({"student": trained.student, "strategies": trained.strategies}).state_dict()
    return {name: value.detach().clone() for name, value in found.items()}


def plan(schedule: Any = "constant", accumulate: int = 1, lr: float = LR) -> TrainingPlan:
    optimizer = partial(torch.optim.AdamW, lr=lr)
    return TrainingPlan(epochs=EPOCHS, optimizer=optimizer, schedule=schedule, accumulate=accumulate)


def linear(steps: int) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    return lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)


def fitted(trained: Distiller, batches: Any, how: TrainingPlan) -> Weights:
    trained.fit(batches, how, quiet=True)
    return weights(trained)


def in_accelerate(steps: int, accumulate: int = 1) -> Weights:
    from accelerate import Accelerator

    trained = distiller(steps)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    example("accelerate_loop").train(accelerator, trained, loader(), EPOCHS)
    return weights(trained)


def in_lightning(steps: int, accumulate: int = 1, rank: int | None = None) -> Weights:
    from lightning.pytorch import Trainer

    module, trained, batches = example("lightning_module"), distiller(steps), loader()
    if rank is not None:  # Lightning's own sampler would shuffle
        batches = DataLoader(data(), batch_size=BATCH, sampler=DistributedSampler(data(), 2, rank, shuffle=False))
    trainer = Trainer(
        max_epochs=EPOCHS,
        gradient_clip_val=1.0,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        strategy="auto" if rank is None else "ddp",
        devices=1 if rank is None else 2,
        use_distributed_sampler=False,
        **module.QUIET,
    )
    trainer.fit(module.Lesson(trained), batches)
    return weights(trained)


def texts(rows: int, ignored: bool) -> list[dict[str, Tensor]]:
    """Some of the first have no label, if such are ``ignored``."""
    generator = torch.Generator().manual_seed(4)
    words = torch.randint(WORDS, (rows, LENGTH), generator=generator)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    if ignored:
        labels[1:6] = -100
    return [{"input_ids": w, "labels": y} for w, y in zip(words, labels, strict=True)]


def text_batches(rows: list[dict[str, Tensor]], size: int) -> list[Any]:
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [
        ({"input_ids": torch.stack([r["input_ids"] for r in p])}, torch.stack([r["labels"] for r in p])) for p in parts
    ]


def text_distiller(steps: int, hidden_states: bool) -> Distiller:
    from transformers import BertConfig, BertForSequenceClassification

    def bert(seed: int, layers: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {"num_hidden_layers": layers, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(**sizes, **no_dropout, vocab_size=WORDS, num_labels=CLASSES, max_position_embeddings=8)
        return BertForSequenceClassification(config)

    strategies: list[Any] = [HardLabels(), (schedules.linear(1.0, 0.0, steps), SoftTargets(2.0, 1.0))]
    if hidden_states:  # of the same width, so without a projection
        strategies.append((0.5, HiddenStates("bert.encoder.layer.*")))
    return Distiller(bert(1, 2), bert(2, 1), strategies)


def in_trainer(trained: Distiller, rows: list[dict[str, Tensor]], folder: Path, accumulate: int = 1) -> Any:
    from transformers import TrainingArguments

    module = example("hf_trainer")
    args = TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulate,
        learning_rate=LR,
        train_sampling_strategy="sequential",
        use_cpu=True,
        **module.QUIET,
    )
    trainer = module.DistillingTrainer(trained, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    return trainer


def main() -> None:
    """The kinds of loop in this process, whose place the environment says; the weights go to files of its rank."""
    folder, *kinds = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for kind in kinds:
        if kind == "accelerate":
            found = in_accelerate(TWO_PROCESSES)
        elif kind == "lightning":
            found = in_lightning(TWO_PROCESSES, rank=rank)
        else:
            trained = text_distiller(TWO_PROCESSES, hidden_states=False)
            in_trainer(trained, texts(ROWS, ignored=True), Path(folder))
            found = weights(trained)
        torch.save(found, Path(folder) / f"{kind}.{rank}.pt")
    gc.collect()  # a reducer that outlives the group frees it with Python locked, which its threads wait for
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
