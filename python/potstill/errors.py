"""Potstill's exceptions. Each says what was given, what was expected and what to do."""


class PotstillError(Exception):
    """Base class of every error that potstill raises on its own account."""


class CacheError(PotstillError, ValueError):
    """A cache of a teacher's outputs is damaged, cannot be written, or belongs to something else."""


class CheckpointError(PotstillError, ValueError):
    """A file is not a valid potstill checkpoint, or does not fit the model it is loaded into."""


class ConversionError(PotstillError, ValueError):
    """A model or layer cannot be changed in the way that was asked for."""
