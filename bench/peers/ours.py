"""potstill itself, as a user would call it."""

from __future__ import annotations

import copy

from torch import nn

import potstill
from peers import GROUP, INT4, INT8, MODEL, PRUNED, SPARSE, Call, Job, Start, contestant
from peers.torch_ import calling, compiled, single
from potstill.nn import Int4Linear, Int8Linear, SparseLinear

_INT8 = potstill.Int8()


@contestant("potstill int8", INT8, INT4, SPARSE)
def int8(job: Job) -> Start:
    layers = [Int8Linear.from_float(layer) for layer in job.module.children() if isinstance(layer, nn.Linear)]
    return calling(nn.Sequential(*layers), job.inputs)


@contestant("potstill int4", INT4)
def int4(job: Job) -> Start:
    layers = [Int4Linear.from_float(layer, group_size=GROUP) for layer in job.module.children()]
    return calling(nn.Sequential(*layers), job.inputs)


@contestant("potstill sparse many", SPARSE)
def sparse_many(job: Job) -> Start:
    """In the order for many rows; the one below in that for few."""
    return calling(SparseLinear.from_float(single(job.module), rows="many"), job.inputs)


@contestant("potstill sparse few", SPARSE)
def sparse_few(job: Job) -> Start:
    return calling(SparseLinear.from_float(single(job.module), rows="few"), job.inputs)


@contestant("potstill eager", MODEL)
def eager(job: Job) -> Start:
    """``quantize_`` decides anew for each number of threads, so it belongs to the start; so for those below."""
    return lambda: calling(_quantized(job), job.inputs)()


@contestant("potstill eager + fuse", MODEL)
def fused(job: Job) -> Start:
    return lambda: calling(_fused(job), job.inputs)()


@contestant("potstill calibrated + fuse", MODEL)
def calibrated(job: Job) -> Start:
    model = copy.deepcopy(job.module)
    batches = job.calibration or (job.inputs,)
    potstill.calibrate_(model, [(*batch, None) for batch in batches], quiet=True)  # None: the target that a loader has

    def start() -> Call:
        changed = copy.deepcopy(model)
        potstill.quantize_(changed, sample_input=job.inputs)
        potstill.fuse_(changed, job.inputs)
        return calling(changed, job.inputs)()

    return start


@contestant("potstill int4 + fuse", MODEL)
def int4_and_fused(job: Job) -> Start:
    """Embeddings, of which there is no int4 form, in int8."""
    embeddings = [name for name, module in job.module.named_modules() if isinstance(module, nn.Embedding)]
    config = potstill.Mixed({**dict.fromkeys(embeddings, _INT8), "*": potstill.Int4(GROUP)})
    return lambda: calling(_fused(job, config), job.inputs)()


@contestant("potstill sparse + fuse", PRUNED)
def sparse_and_fused(job: Job) -> Start:
    """Layers with zeros as sparse ones where that is faster, the others in int8."""

    def start() -> Call:
        model = copy.deepcopy(job.module)
        potstill.realise_(model, job.inputs)
        potstill.quantize_(model, sample_input=job.inputs)
        potstill.fuse_(model, job.inputs)
        return calling(model, job.inputs)()

    return start


@contestant("potstill + fuse compiled", MODEL)
def fused_and_compiled(job: Job) -> Start:
    return lambda: compiled(_fused(job), job.inputs)()


def _fused(job: Job, config: potstill.Int8 | potstill.Mixed = _INT8) -> nn.Module:
    model = _quantized(job, config)
    potstill.fuse_(model, job.inputs)
    return model


def _quantized(job: Job, config: potstill.Int8 | potstill.Mixed = _INT8) -> nn.Module:
    model = copy.deepcopy(job.module)
    potstill.quantize_(model, config, sample_input=job.inputs)
    return model
