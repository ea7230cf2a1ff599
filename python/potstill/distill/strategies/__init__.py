"""How knowledge is transferred: each strategy is a term of the loss, one to a file."""

from potstill.distill.strategies.hard_labels import HardLabels
from potstill.distill.strategies.soft_targets import SoftTargets
from potstill.distill.strategies.strategy import STRATEGIES, Strategy, register

__all__ = ["STRATEGIES", "HardLabels", "SoftTargets", "Strategy", "register"]
