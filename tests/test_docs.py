"""The examples in docstrings, in the README and in docs/ run, and print what they say."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import potstill

PACKAGE = Path(potstill.__file__).parent
SOURCE = Path(__file__).parents[1]


def docstrings(path: Path) -> list[tuple[int, str]]:
    """Every string that stands alone, so also those below a variable, which doctest itself does not see."""
    statements = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Expr))
    texts = (node.value for node in statements if isinstance(node.value, ast.Constant))
    return [(node.lineno, node.value) for node in texts if isinstance(node.value, str) and ">>> " in node.value]


def examples() -> list[object]:
    return [
        pytest.param(path, line, text, id=f"{path.relative_to(PACKAGE)}:{line}")
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, text in docstrings(path)
    ]


@pytest.mark.parametrize(("path", "line", "text"), examples())
def test_docstring(path: Path, line: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = ".".join(["potstill", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    test = doctest.DocTestParser().get_doctest(text, vars(importlib.import_module(name)).copy(), name, str(path), line)
    complaints: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=complaints.append)
    assert not complaints, "".join(complaints)


def pages() -> list[object]:
    """Each block of Python in README and docs/, on its own."""
    return [
        pytest.param(path, code, id=f"{path.name}: {code.strip().splitlines()[-1]}")
        for path in (SOURCE / "README.md", *sorted((SOURCE / "docs").glob("*.md")))
        for code in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    ]


@pytest.mark.parametrize(("path", "code"), pages())
def test_page(path: Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, path.name, "exec"), {"__name__": "page"})
