"""Shows a demo's record as one HTML file without outside parts, and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from potstill.report import plot

_SERIES = {"teacher": 0, "plain": 1, "distilled": 2, "int8": 3}


def page(record: Mapping[str, Any]) -> str:
    """One HTML document of the numbers in ``record`` (what :func:`potstill.demo.run` returns), charts included."""
    return (
        environment()
        .get_template("template.html.j2")
        .render(
            record=record,
            models=list(_with_ratios(record["models"])),
            charts=list(_charts(record)),
            verdict=verdict(record),
            gain=gain_in_words(record),
            reload=reload_in_words(record),
            cards=list(_cards(record)),
            layers=layers(record["quantize"]),
        )
    )


def layers(report: Mapping[str, Any]) -> Markup:
    """The per-layer table of ``Report.to_dict()`` as an HTML fragment.

    >>> import torch, potstill.transform
    >>> report = potstill.transform.quantize_(torch.nn.Sequential(torch.nn.Linear(8, 8)), exclude="0")
    >>> "excluded by 0" in layers(report.to_dict())
    True
    """
    return Markup(environment().get_template("layers.html.j2").render(report=report))


def show(record: Mapping[str, Any], console: Console) -> None:
    """Prints the same numbers for people at a terminal."""
    table = Table(title=f"{record['images']['name']}: {record['images']['test']} test images")
    table.add_column("model", no_wrap=True)
    headings = ("accuracy %", "parameters", "on disk", "1 image", "256 images", "× teacher", "× float32")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for model in _with_ratios(record["models"]):
        latency = model["latency"]
        times = [seconds(latency[size]["median"]) for size in ("1", "256")] if latency else ["", ""]
        ratios = [f"{model[key]['256']:.2f}" if key in model else "" for key in ("to_teacher", "to_float")]
        cells = f"{model['accuracy']:.2f}", f"{model['parameters']:,}", size(model["bytes"]), *times, *ratios
        table.add_row(Text(model["title"]), *cells)
    console.print(table)
    console.print(Text(gain_in_words(record)))
    for row in record["quantize"]["layers"]:
        console.print(Text(f"{' = '.join(row['names'])}: {row['action']}, {row['reason']}"))
    console.print(Text(reload_in_words(record)))


def verdict(record: Mapping[str, Any]) -> str:
    """The outcome in one sentence."""
    models = {model["key"]: model for model in _with_ratios(record["models"])}
    teacher, small = models["teacher"], models["int8"]
    return (
        f"The int8 student is {teacher['bytes'] / small['bytes']:.0f} times smaller on disk than its teacher and "
        f"{small['to_teacher']['256']:.0f} times faster on 256 images ({small['to_teacher']['1']:.1f} times on one). "
        f"Its accuracy is {small['accuracy']:.2f} %, the teacher's {teacher['accuracy']:.2f} %."
    )


def gain_in_words(record: Mapping[str, Any]) -> str:
    """What distillation gained, and whether that is more than chance."""
    gain = record["distillation"]["gain"]
    points, error = gain["points"], gain["standard_error"]
    if abs(points) <= 2 * error:
        meaning = "less than two standard errors, so it may be chance"
    else:
        meaning = "more than two standard errors" + (", so the teacher did harm" if points < 0 else "")
    return (
        f"Distillation: {points:+.2f} ± {error:.2f} points of accuracy against the same student trained without the "
        f"teacher ({meaning}; one seed)."
    )


def reload_in_words(record: Mapping[str, Any]) -> str:
    """How the saved model fared in a new process."""
    how = "bit for bit the same" if record["reload"]["identical"] else "not the same"
    return f"Saved, and loaded in a new process: its outputs are {how}; accuracy {record['reload']['accuracy']:.2f} %."


def seconds(value: float) -> str:
    """A time in the unit that suits it.

    >>> seconds(0.00123), seconds(4.2e-06), seconds(75.0)
    ('1.23 ms', '4.2 µs', '75 s')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{_three(value / scale)} {unit}"
    return f"{_three(value / 1e-6)} µs"


def size(count: float) -> str:
    """A number of bytes in the unit that suits it.

    >>> size(1_234_567), size(999)
    ('1.23 MB', '999 B')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{_three(count / scale)} {unit}"
    return f"{count:.0f} B"


def _three(value: float) -> str:
    """Three significant digits, without an exponent for large values."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _with_ratios(models: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The models with their keys, and how many times faster than the teacher and the float32 student they are."""
    for key, model in models.items():
        ratios: dict[str, dict[str, float]] = {}
        for name, other in (("to_teacher", "teacher"), ("to_float", "distilled")):
            if model["latency"] and key not in ("teacher", other):
                ratios[name] = {
                    batch: models[other]["latency"][batch]["median"] / timing["median"]
                    for batch, timing in model["latency"].items()
                }
        yield {"key": key, **model, **ratios}


def _cards(record: Mapping[str, Any]) -> Iterable[dict[str, str]]:
    models = {model["key"]: model for model in _with_ratios(record["models"])}
    teacher, plain, distilled, small = (models[key] for key in ("teacher", "plain", "distilled", "int8"))
    yield {
        "label": "Accuracy",
        "value": f"{small['accuracy']:.2f} %",
        "note": f"teacher {teacher['accuracy']:.2f} %",
    }
    yield {
        "label": "By distillation",
        "value": f"{distilled['accuracy'] - plain['accuracy']:+.2f}",
        "note": f"points, ± {record['distillation']['gain']['standard_error']:.2f}",
    }
    yield {
        "label": "By int8",
        "value": f"{small['accuracy'] - distilled['accuracy']:+.2f}",
        "note": "points of accuracy",
    }
    yield {
        "label": "Smaller on disk",
        "value": f"{teacher['bytes'] / small['bytes']:.0f}×",
        "note": f"{size(teacher['bytes'])} to {size(small['bytes'])}",
    }
    yield {
        "label": "Faster on 256 images",
        "value": f"{small['to_teacher']['256']:.0f}×",
        "note": f"by int8 alone {small['to_float']['256']:.2f}×",
    }


def _charts(record: Mapping[str, Any]) -> Iterable[Markup]:
    models = list(_with_ratios(record["models"]))

    def bar(model: Mapping[str, Any], value: float, text: str) -> plot.Bar:
        return plot.Bar(model["title"], value, text, _SERIES[model["key"]])

    wrong = [(model, 100 - model["accuracy"]) for model in models]
    yield plot.bars("Test error", "% of the test images, less is better", [bar(m, w, f"{w:.2f} %") for m, w in wrong])
    yield plot.bars("Size on disk", "kB", [bar(m, m["bytes"] / 1e3, size(m["bytes"])) for m in models])
    for batch, title in (("1", "Latency, 1 image per call"), ("256", "Latency, 256 images per call")):
        timed = [(model, model["latency"][batch]["median"]) for model in models if model["latency"]]
        yield plot.bars(title, "milliseconds per call, median", [bar(m, 1e3 * t, _time(m, t, batch)) for m, t in timed])
    for key, title, axis in (
        ("accuracy", "Accuracy while training", "% of the test images"),
        ("loss", "Test loss while training", "cross-entropy"),
    ):
        curves = [
            plot.Line(
                record["models"][name]["title"], [epoch[key] for epoch in record["training"][name]], _SERIES[name]
            )
            for name in ("plain", "distilled")
        ]
        yield plot.lines(title, "epoch", axis, curves)


def _time(model: Mapping[str, Any], value: float, batch: str) -> str:
    ratio = f" ({model['to_teacher'][batch]:.1f}×)" if "to_teacher" in model else ""
    return seconds(value) + ratio


def environment() -> jinja2.Environment:
    """What turns templates of this folder into pages."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"seconds": seconds, "size": size}
    return found
