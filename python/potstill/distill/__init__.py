"""Distillation: a student learns from a teacher."""

from potstill.distill.batch import Batch, Outputs
from potstill.distill.distiller import Distiller
from potstill.distill.history import Epoch, History
from potstill.distill.strategies import STRATEGIES, HardLabels, SoftTargets, Strategy, register

__all__ = [
    "STRATEGIES",
    "Batch",
    "Distiller",
    "Epoch",
    "HardLabels",
    "History",
    "Outputs",
    "SoftTargets",
    "Strategy",
    "register",
]
