"""How knowledge is transferred: each strategy is a term of the loss, one to a file."""

from potstill.distill.strategies.attention_relations import AttentionRelations
from potstill.distill.strategies.attention_transfer import AttentionTransfer
from potstill.distill.strategies.contrastive import Contrastive
from potstill.distill.strategies.dist import DIST
from potstill.distill.strategies.gram import Gram
from potstill.distill.strategies.hard_labels import HardLabels
from potstill.distill.strategies.hidden_states import HiddenStates
from potstill.distill.strategies.layers import LayerStrategy, ProjectedStrategy
from potstill.distill.strategies.logit_standardisation import LogitStandardisation
from potstill.distill.strategies.relational import Relational
from potstill.distill.strategies.similarity import Similarity
from potstill.distill.strategies.soft_targets import SoftTargets
from potstill.distill.strategies.strategy import STRATEGIES, Strategy, register

__all__ = [
    "DIST",
    "STRATEGIES",
    "AttentionRelations",
    "AttentionTransfer",
    "Contrastive",
    "Gram",
    "HardLabels",
    "HiddenStates",
    "LayerStrategy",
    "LogitStandardisation",
    "ProjectedStrategy",
    "Relational",
    "Similarity",
    "SoftTargets",
    "Strategy",
    "register",
]
