"""Batches of a quantised model on one CPU: one process with all cores, or a pinned process for each share of them.

    python bench/bench_processes.py [--processes 2] [--json bench/results/processes.json]

A BERT of ``--layers`` layers in int8 answers one sequence of ``--tokens`` tokens after the other. Both ways run in
turn, several rounds; what counts is the ratio of sequences per second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import potstill
from potstill.parallel import pin
from potstill.report.machine import machine

ROUNDS, SECONDS = 7, 2.0


def serve(rank: int, ranks: int, layers: int, tokens: int, pipe: Connection) -> None:
    """A process: counts the sequences that it answers between a moment and another, each time that it is told."""
    pin(rank, ranks)
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=layers)
    model: Any = transformers.BertModel(config, add_pooling_layer=False).eval()
    x = torch.randint(0, 30000, (1, tokens))
    potstill.quantize_(model, potstill.Int8(), sample_input=(x,), only_if_faster=False)
    potstill.fuse_(model, (x,))
    with torch.inference_mode():
        model(x)
        pipe.send("ready")
        while (begin := pipe.recv()) is not None:
            while time.monotonic() < begin:
                pass
            count = 0
            while time.monotonic() < begin + SECONDS:
                model(x)
                count += 1
            pipe.send(count / (time.monotonic() - begin))


class Service:
    """So many processes, which wait between the rounds."""

    def __init__(self, ranks: int, layers: int, tokens: int) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(ranks)]
        self.pipes = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=serve, args=(rank, ranks, layers, tokens, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for pipe in self.pipes:
            pipe.recv()

    def rate(self) -> float:
        """Sequences per second of all processes together."""
        begin = time.monotonic() + 0.05
        for pipe in self.pipes:
            pipe.send(begin)
        return float(sum(pipe.recv() for pipe in self.pipes))

    def end(self) -> None:
        """Lets the processes go."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=torch.get_num_threads(), help="default: one for each core")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, action="append", help="default: 8, 32 and 128; may be repeated")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args()
    rows = []
    for tokens in options.tokens or (8, 32, 128):
        one, many = Service(1, options.layers, tokens), Service(options.processes, options.layers, tokens)
        rates = [(one.rate(), many.rate()) for _ in range(ROUNDS)]
        one.end()
        many.end()
        ratio = statistics.median(b / a for a, b in rates)
        rows.append({"tokens": tokens, "one": [a for a, _ in rates], "many": [b for _, b in rates], "ratio": ratio})
        Console().print(f"{tokens} tokens: {options.processes} pinned processes answer {ratio:.2f} times as many")
    if options.json is not None:
        settings = {"processes": options.processes, "layers": options.layers, "seconds": SECONDS}
        options.json.write_text(json.dumps({"settings": settings, "machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
