from torch import Tensor

def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    factor: Tensor | None,
    y: Tensor,
    /,
) -> None: ...
def int4_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    out_features: int,
    group_size: int,
    /,
) -> None: ...
def sparse_int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    factor: Tensor | None,
    y: Tensor,
    /,
) -> None: ...
def sparse_linear(
    x: Tensor,
    weight: Tensor,
    out_features: int,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    y: Tensor,
    /,
) -> None: ...
def kd_loss(
    student: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    loss: Tensor,
    grad: Tensor | None,
    divergence: str,
    beta: float,
    rest: str,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    normalizer: float,
    /,
) -> None: ...
def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    /,
) -> None: ...
def int8_embedding(weight: Tensor, scale: Tensor, indices: Tensor, y: Tensor, /) -> None: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    y: Tensor,
    /,
) -> None: ...
def peak_int8(iterations: int, threads: int) -> float: ...
def peak_f32(iterations: int, threads: int) -> float: ...
def read_memory(data: Tensor, repeats: int, threads: int) -> float: ...
