"""The whole way on real data: a teacher, a distilled student, its int8 form, saved, loaded and reported."""

from potstill.demo.pipeline import run

__all__ = ["run"]
