"""Which weights matter: each criterion is a function that scores them, one to a file."""

from potstill.transform.criteria.criterion import CRITERIA, Criterion, LayerFacts, criterion, register
from potstill.transform.criteria.magnitude import magnitude
from potstill.transform.criteria.movement import movement
from potstill.transform.criteria.random import random
from potstill.transform.criteria.snip import snip
from potstill.transform.criteria.sparsegpt import SparseGPT
from potstill.transform.criteria.taylor import taylor
from potstill.transform.criteria.wanda import wanda

__all__ = [
    "CRITERIA",
    "Criterion",
    "LayerFacts",
    "SparseGPT",
    "criterion",
    "magnitude",
    "movement",
    "random",
    "register",
    "snip",
    "taylor",
    "wanda",
]
