from torch import Tensor

def int8_24_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    /,
) -> None: ...
