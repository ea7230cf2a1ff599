"""Which of a teacher's features can stand for which of a narrower student's."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from potstill.distill.follow import Axis, Followed

# Features with one signature, how often they occur on which axes, can stand for each other.
Signature = frozenset[tuple[Axis, int]]
Block = dict[Signature, list[int]]  # the labels of one attention head, by signature; or of all that has no blocks


@dataclass(frozen=True)
class Cut:
    """Features that are chosen together: the student's ``own`` blocks, and the teacher's ``given`` to take from.

    Both name them by the student's signatures. Where there are as many blocks, features are chosen inside each;
    where a block has as many features, it is taken whole. ``axes`` are the student's that have these features.
    """

    own: list[Block]
    given: list[Block]
    axes: list[Axis]

    @property
    def sizes(self) -> tuple[int, int]:
        """How many features the student and the teacher have, of the kind of which there are most."""
        own, given = (
            max(sum(len(block[s]) for block in blocks) for s in self.own[0]) for blocks in (self.own, self.given)
        )
        return own, given

    def inner(self, signature: Signature) -> bool:
        """Whether features of this signature are chosen inside a block."""
        return len(self.own[0][signature]) < len(self.given[0][signature])

    def unfit(self, given: Followed) -> str:
        """Why the student's features cannot be taken from the ``given`` ones; empty where they can."""
        if not all(self.given[0].get(s) for s in self.own[0]):
            return "the teacher connects other tensors here than the student"
        if len(self.own) > len(self.given):
            return f"the student has {len(self.own)} heads or groups here, the teacher {len(self.given)}"
        for blocks in (self.own, self.given):
            if any(len(block.get(s, ())) != len(blocks[0][s]) for block in blocks for s in self.own[0]):
                return "heads or groups are not of one size"
        if any(len(self.own[0][s]) > len(self.given[0][s]) for s in self.own[0]):
            return "the student has larger heads or groups here than the teacher"
        labels = [label for block in self.given for s in block for label in block[s]]
        if not any(label in given.read or label in given.paired for label in labels):
            return (
                "what reads its features was not seen: they are the model's input or output, which must agree, or pass "
                "an operation that is not followed"
            )
        for s in self.own[0]:
            label = self.given[0][s][0]
            if self.inner(s) and label in given.paired and label not in given.scales:
                return "heads can be made smaller only where torch's scaled_dot_product_attention tells their scale"
        return ""


def cuts(own: Followed, given: Followed, source: Callable[[str], str]) -> list[Cut]:
    """What is to be chosen for a student, given what was seen of it and its teacher.

    ``source`` tells the teacher's tensor of a student's. Every feature of the student is in one cut.
    """
    mine = _by_signature(own.axes)
    used = {(source(name), dim) for name, dim in own.axes}
    theirs = _by_signature({axis: ids for axis, ids in given.axes.items() if axis in used})
    from_teacher = {s: theirs.get(_renamed(s, source), []) for s in mine}
    own_blocks, given_blocks = _several(mine, own.blocks), _several(from_teacher, given.blocks)
    found = []
    for family in dict.fromkeys(_families(mine, from_teacher, own_blocks, given_blocks)):
        touched = {axis for signature in family for axis, _ in signature}
        axes = [axis for axis in own.axes if axis in touched]
        found.append(Cut(_blocks(family, mine, own_blocks), _blocks(family, from_teacher, given_blocks), axes))
    return found


def _several(labels: Mapping[Signature, list[int]], blocks: Mapping[int, int]) -> dict[int, int]:
    # One head is as good as none, and not all that belongs to it need show it.
    return {
        label: blocks[label]
        for some in labels.values()
        if len({blocks.get(label) for label in some}) > 1
        for label in some
        if label in blocks
    }


def _by_signature(axes: Mapping[Axis, Tensor]) -> dict[Signature, list[int]]:
    where: dict[int, dict[Axis, int]] = defaultdict(dict)
    for axis, ids in axes.items():
        for label, count in Counter(ids.tolist()).items():
            where[label][axis] = count
    found: dict[Signature, list[int]] = defaultdict(list)
    for label in sorted(where):
        found[frozenset(where[label].items())].append(label)
    return dict(found)


def _renamed(signature: Signature, source: Callable[[str], str]) -> Signature:
    # A layer that is used twice brings the same axis twice.
    return frozenset(((source(name), dim), count) for (name, dim), count in signature)


def _families(
    mine: Mapping[Signature, list[int]],
    theirs: Mapping[Signature, list[int]],
    own: Mapping[int, int],
    given: Mapping[int, int],
) -> list[frozenset[Signature]]:
    # A student with one head shows no blocks: then the teacher's tell what belongs together.
    in_own, in_given = _signatures_in(mine, own), _signatures_in(theirs, given)
    found = []
    for signature, labels in mine.items():
        if labels[0] in own:
            found.append(frozenset(in_own[own[labels[0]]]))
        elif theirs[signature] and theirs[signature][0] in given:
            found.append(frozenset(in_given[given[theirs[signature][0]]]))
        else:
            found.append(frozenset([signature]))
    return found


def _signatures_in(labels: Mapping[Signature, list[int]], blocks: Mapping[int, int]) -> dict[int, set[Signature]]:
    found: dict[int, set[Signature]] = defaultdict(set)
    for signature, some in labels.items():
        for label in some:
            if label in blocks:
                found[blocks[label]].add(signature)
    return found


def _blocks(
    family: frozenset[Signature], labels: Mapping[Signature, list[int]], blocks: Mapping[int, int]
) -> list[Block]:
    found: dict[int, Block] = defaultdict(dict)
    for signature in (signature for signature in labels if signature in family):  # in order: a set has none
        for label in labels[signature]:
            found[blocks.get(label, 0)].setdefault(signature, []).append(label)
    ordered = sorted(found.values(), key=lambda block: min(min(some) for some in block.values()))
    return ordered or [{}]
