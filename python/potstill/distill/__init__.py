"""Distillation: a student learns from a teacher."""

from potstill.distill import metrics, schedules
from potstill.distill.batch import Batch, Indexed, Outputs, TopK
from potstill.distill.cache import CachedTeacher, collate_indexed
from potstill.distill.callbacks import Callback, Run
from potstill.distill.distiller import Distiller
from potstill.distill.generate import beam_search, generate
from potstill.distill.history import Epoch, History
from potstill.distill.initialise import Initialisation, initialise
from potstill.distill.int8_teacher import Int8Teacher, int8_teacher
from potstill.distill.on_policy import OnPolicy
from potstill.distill.plan import EarlyStopping, TrainingPlan
from potstill.distill.pruning import GradualPruning
from potstill.distill.recipe import Recipe
from potstill.distill.sequence_level import teacher_sequences
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
from potstill.distill.until import Search, Trial, distill_until
from potstill.distill.widths import Width

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
    "GradualPruning",
    "Gram",
    "HardLabels",
    "HiddenStates",
    "History",
    "Indexed",
    "Initialisation",
    "Int8Teacher",
    "LayerStrategy",
    "LogitStandardisation",
    "OnPolicy",
    "Outputs",
    "ProjectedStrategy",
    "Recipe",
    "Relational",
    "Run",
    "Search",
    "Similarity",
    "SoftTargets",
    "Strategy",
    "Teachers",
    "TopK",
    "TrainingPlan",
    "Trial",
    "Width",
    "beam_search",
    "collate_indexed",
    "distill_until",
    "generate",
    "initialise",
    "int8_teacher",
    "metrics",
    "register",
    "schedules",
    "teacher_sequences",
]
