"""``torch.ao.quantization.quantize_dynamic``, once per engine of this torch; whole models and zeros with the first."""

from __future__ import annotations

from peers import INT8, MODEL, SPARSE, Job, Start, contestant
from peers.torch_ import first, single
from potstill.ops.rivals import dynamic, engines


def _enter(engine: str) -> None:
    tables = (INT8, SPARSE, MODEL) if engine == engines()[0] else (INT8,)

    @contestant(f"quantize_dynamic {engine}", *tables)
    def prepare(job: Job) -> Start:
        call = dynamic(single(job.module), engine, *job.inputs)
        return lambda: lambda: first(call())


for _engine in engines():
    _enter(_engine)
