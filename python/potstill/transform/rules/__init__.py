"""The ways in which a module may be replaced, one kind of module per file."""

from __future__ import annotations

from typing import Any

from torch import nn

from potstill.transform.configs import Config
from potstill.transform.rules.attention import AttentionToInt8, EncoderLayerToInt8
from potstill.transform.rules.embedding import EmbeddingToInt8
from potstill.transform.rules.linear import LinearToInt4, LinearToInt8
from potstill.transform.rules.rule import Rule

RULES: tuple[Rule[Any], ...] = (
    LinearToInt8(),
    LinearToInt4(),
    EmbeddingToInt8(),
    AttentionToInt8(),
    EncoderLayerToInt8(),
)
"""Every rule there is."""


def rule_for(module: nn.Module, config: Config) -> Rule[Any] | None:
    """The rule by which ``module`` becomes what ``config`` asks for; None if there is none."""
    found = (rule for rule in RULES if rule.replaces(module) and isinstance(config, rule.config))
    return next(found, None)
