"""Distillation: a student learns from a teacher."""

from potstill.distill import schedules
from potstill.distill.batch import Batch, Outputs
from potstill.distill.callbacks import Callback, Run
from potstill.distill.distiller import Distiller
from potstill.distill.history import Epoch, History
from potstill.distill.initialise import Initialisation, initialise
from potstill.distill.plan import EarlyStopping, TrainingPlan
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
    "Callback",
    "Contrastive",
    "Distiller",
    "EarlyStopping",
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
    "Run",
    "Similarity",
    "SoftTargets",
    "Strategy",
    "Teachers",
    "TrainingPlan",
    "initialise",
    "register",
    "schedules",
]
