"""Distillation in a LightningModule: the student is trained, the teacher stays out of it.

An MLP of 256 hidden units has learned 100 labelled digits. One of 8 learns the same 100 labels alone, and again, for
as many steps, what the teacher says about 1000 digits, without a label.

    pip install potstill[demo] lightning
    python examples/loops/lightning_module.py
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

from potstill.distill import Distiller, HardLabels, SoftTargets

LABELLED, TRAINING, STEPS = 100, 1000, 600
QUIET = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")} | {"logger": False}


class Lesson(LightningModule):
    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        # Modules of this one are put on the device, into training mode, trained and saved. The teacher is none.
        self.student, self.strategies = distiller.student, distiller.strategies
        self.distiller = distiller

    def on_fit_start(self) -> None:
        if self.distiller.teacher is not None:
            self.distiller.teacher.to(self.device)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.distiller.loss(batch, step=self.global_step + 1)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.student(x).argmax(-1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.distiller.parameters(), lr=2e-2)
        scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    torch.set_num_threads(1)  # networks as small as these do not gain from a second
    torch.manual_seed(0)
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(y))
    x, y = x[order].float() / 16, y[order]
    labelled = DataLoader(TensorDataset(x[:LABELLED], y[:LABELLED]), batch_size=50, shuffle=True)
    no_labels = 0 * y[:TRAINING]  # with alpha=1 soft targets do not look at them
    everything = DataLoader(TensorDataset(x[:TRAINING], no_labels), batch_size=50, shuffle=True)
    test = DataLoader(TensorDataset(x[TRAINING:], y[TRAINING:]), batch_size=200)

    def learn(name: str, hidden: int, loader: DataLoader, teacher: nn.Module | None = None) -> nn.Module:
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        strategy = HardLabels() if teacher is None else SoftTargets(temperature=2.0, alpha=1.0)
        lesson = Lesson(Distiller(teacher, student, strategy))
        trainer = Trainer(max_steps=STEPS, gradient_clip_val=1.0, devices=1, check_val_every_n_epoch=10, **QUIET)
        (before,) = trainer.validate(lesson, test, verbose=False)
        trainer.fit(lesson, loader, test)
        print(f"{name}: {before} untrained, {trainer.validate(lesson, test, verbose=False)[0]} trained")
        return student

    teacher = learn("teacher", 256, labelled)
    learn("student alone", 8, labelled)
    learn("student distilled", 8, everything, teacher)


if __name__ == "__main__":
    main()
