"""A frozen teacher's outputs, computed once and read in every epoch."""

from potstill.distill.cache.cached import CachedTeacher
from potstill.distill.cache.examples import IndexedDataset, collate_indexed

__all__ = ["CachedTeacher", "IndexedDataset", "collate_indexed"]
