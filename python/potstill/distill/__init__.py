"""Distillation: a student learns from a teacher."""

from potstill.distill import metrics, schedules
from potstill.distill.batch import Batch, Indexed, Outputs, TopK
from potstill.distill.cache import CachedTeacher, collate_indexed
from potstill.distill.callbacks import Callback, Run
from potstill.distill.distiller import Distiller
from potstill.distill.history import Epoch, History
from potstill.distill.initialise import Initialisation, initialise
from potstill.distill.int8_teacher import Int8Teacher, int8_teacher
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
    "CachedTeacher",
    "Callback",
    "Contrastive",
    "Distiller",
    "EarlyStopping",
    "Epoch",
    "Gram",
    "HardLabels",
    "HiddenStates",
    "History",
    "Indexed",
    "Initialisation",
    "Int8Teacher",
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
    "TopK",
    "TrainingPlan",
    "collate_indexed",
    "initialise",
    "int8_teacher",
    "metrics",
    "register",
    "schedules",
]
