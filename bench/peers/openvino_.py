"""OpenVINO with NNCF: int8 weights and activations (calibrated), and compressed int8 and int4 weights."""

from __future__ import annotations

import logging
import os
from typing import Any

# Read when the two are imported. Else they send usage data from processes of their own, which also disturbs timings.
os.environ.setdefault("CI", "true")
os.environ.setdefault("NNCF_CI", "1")

import nncf
import openvino as ov
import torch
from torch import Tensor, nn

from peers import GROUP, INT4, INT8, MODEL, SPARSE, Call, Job, Start, contestant

nncf.set_log_level(logging.ERROR)


@contestant("OpenVINO int8", INT8, SPARSE, MODEL)
def int8(job: Job) -> Start:
    """``nncf.quantize``: the ranges of activations are fixed by calibration."""
    kind = None if isinstance(job.module, nn.Sequential) else nncf.ModelType.TRANSFORMER
    batches = job.calibration or (job.inputs,)
    data = nncf.Dataset([[x.numpy() for x in batch] for batch in batches])
    model = nncf.quantize(_converted(job), data, model_type=kind, subset_size=len(batches))
    return lambda: _session(model, job.inputs)


@contestant("OpenVINO int8 weights", INT8, SPARSE, MODEL)
def int8_weights(job: Job) -> Start:
    """``nncf.compress_weights``; activations are quantised by the runtime in groups where it can."""
    model = nncf.compress_weights(_converted(job), mode=nncf.CompressWeightsMode.INT8_SYM)
    return lambda: _session(model, job.inputs)


@contestant("OpenVINO int4", INT4)
def int4(job: Job) -> Start:
    mode = nncf.CompressWeightsMode.INT4_SYM
    model = nncf.compress_weights(_converted(job), mode=mode, group_size=GROUP, ratio=1.0, all_layers=True)
    return lambda: _session(model, job.inputs)


def _converted(job: Job) -> ov.Model:
    """With the shapes of the inputs, which lets the runtime plan for them."""
    shapes = [ov.PartialShape(list(x.shape)) for x in job.inputs]
    return ov.convert_model(job.module, example_input=job.inputs, input=shapes)


def _session(model: ov.Model, inputs: tuple[Tensor, ...]) -> Call:
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    for i, x in enumerate(inputs):
        request.set_input_tensor(i, ov.Tensor(x.numpy(), shared_memory=True))
    infer = request.infer

    def call() -> Any:
        return infer(share_outputs=True)[0]

    return call
