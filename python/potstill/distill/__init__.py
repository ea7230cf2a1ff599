"""Distillation: a student learns from a teacher."""

from potstill.distill import schedules
from potstill.distill.batch import Batch, Outputs
from potstill.distill.distiller import Distiller
from potstill.distill.history import Epoch, History
from potstill.distill.initialise import Initialisation, initialise
from potstill.distill.strategies import (
    DIST,
    STRATEGIES,
    AttentionRelations,
    AttentionTransfer,
    Contrastive,
    Gram,
    HardLabels,
    HiddenStates,
    LayerStrategy,
    LogitStandardisation,
    ProjectedStrategy,
    Relational,
    Similarity,
    SoftTargets,
    Strategy,
    register,
)
from potstill.distill.teachers import Teachers

__all__ = [
    "DIST",
    "STRATEGIES",
    "AttentionRelations",
    "AttentionTransfer",
    "Batch",
    "Contrastive",
    "Distiller",
    "Epoch",
    "Gram",
    "HardLabels",
    "HiddenStates",
    "History",
    "Initialisation",
    "LayerStrategy",
    "LogitStandardisation",
    "Outputs",
    "ProjectedStrategy",
    "Relational",
    "Similarity",
    "SoftTargets",
    "Strategy",
    "Teachers",
    "initialise",
    "register",
    "schedules",
]
