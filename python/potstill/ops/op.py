"""The contract of an op: one schema, one pure-torch definition, and the kernels that agree with it."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

_LIBRARY = torch.library.Library("potstill", "DEF")

_REQUIRED = object()  # in place of the default of an argument that has none

OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Sample:
    """Named arguments of an op, for its tests and its benchmarks.

    ``label`` tells the shapes; ``make`` builds the arguments anew, always the same numbers. ``slack`` is a factor of
    the op's tolerance, where these numbers lose more digits than others.
    """

    label: str
    make: Callable[[], dict[str, Any]]
    slack: float = 1.0


@dataclass(frozen=True)
class Cost:
    """The work that no implementation can avoid: the benchmarks call the larger quotient the floor.

    ``int8_ops`` and ``f32_ops`` count a multiply-add as two; ``bytes`` is what must be read and written once.
    """

    int8_ops: float = 0.0
    f32_ops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Kernel:
    """A fast implementation for one device type.

    ``dtypes`` are the dtypes of the op's first tensor it accepts; other inputs take the reference. ``needs`` is a
    package without which it takes the reference for all. ``note`` says what else depends on this machine, if anything.
    """

    function: Callable[..., Any]
    dtypes: frozenset[torch.dtype]
    needs: str | None = None
    note: Callable[[], str] | None = None


@cache
def gpu_function(module: str, name: str) -> Callable[..., Any] | None:
    """A function of a module in :mod:`potstill.ops.triton`; without Triton None, and a warning the first time."""
    if importlib.util.find_spec("triton") is None:
        warnings.warn(
            "potstill: Triton is not installed, so that plain torch computes on the GPU; pip install triton",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    function: Callable[..., Any] = getattr(importlib.import_module(f"potstill.ops.triton.{module}"), name)
    return function


@dataclass(frozen=True)
class Op:
    """An operation ``torch.ops.potstill.<name>``: registered with torch when it is made, and callable.

    - ``schema``: as in ``torch.library``; names and types of the arguments and results.
    - ``reference``: pure torch; the definition, the fallback on every device, the oracle and the baseline.
    - ``fake``: results' shapes and dtypes from the arguments'.
    - ``kernels``: device type -> :class:`Kernel`.
    - ``differentiable``, ``setup_context``, ``backward``: positions of the arguments that may need a gradient, and the
      two static methods of a :class:`torch.autograd.Function`. The Function is entered only when one of them requires
      a gradient: registered with the dispatcher it would cost every call 7 us, more than a small layer. Without
      ``backward`` asking for a gradient raises.
    - ``autocast``: whether the first argument takes the autocast dtype under ``torch.autocast``; otherwise the op sees
      its arguments as they are.
    - ``samples``: ``"test"`` or ``"bench"`` -> samples; the tests and the benchmarks walk them.
    - ``tolerance``: dtype of the first tensor -> largest error against the float64 reference, relative to the largest
      value of the result.
    - ``cost``: arguments -> :class:`Cost`.
    - ``run``: what a benchmark times for given arguments; the call itself unless the op is timed with its gradient.
    - ``rivals``: arguments -> name -> callable: what a user would call instead; ``"torch eager"`` comes first.
    - ``lay_out``: arguments, type of a device -> the same with weights in the layout of its kernels, where layouts
      differ.

    >>> from potstill.ops import OPS
    >>> sorted(OPS)
    ['add_layer_norm', 'attention', 'block_sparse_linear', 'int4_linear', 'int8_embedding', 'int8_linear', 'kd_loss', \
'linear_kd_loss', 'semi_sparse_int8_linear', 'sparse_int8_linear', 'sparse_linear']
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    kernels: Mapping[str, Kernel]
    samples: Callable[[str], Iterable[Sample]]
    tolerance: Mapping[torch.dtype, float]
    cost: Callable[..., Cost]
    rivals: Callable[..., dict[str, Callable[[], Any]]]
    autocast: bool = False
    differentiable: tuple[int, ...] = ()
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    run: Callable[..., Callable[[], Any]] | None = None
    lay_out: Callable[[dict[str, Any], str], dict[str, Any]] | None = None
    _call: Any = field(init=False, repr=False)
    _with_gradient: Callable[..., Any] = field(init=False, repr=False)
    _defaults: tuple[tuple[str, Any], ...] = field(init=False, repr=False)  # name and value of every argument

    def __post_init__(self) -> None:
        name = self.name
        _LIBRARY.define(self.schema, tags=())
        _LIBRARY.impl(name, self.reference, "CompositeExplicitAutograd")
        for device, kernel in self.kernels.items():
            _LIBRARY.impl(name, self._with_fallback(kernel), device.upper())
        for device in ("cpu", "cuda"):
            _LIBRARY.impl(name, _under_autocast(self, device), f"Autocast{device.upper()}")
        torch.library.register_fake(f"potstill::{name}", self.fake, lib=_LIBRARY)
        object.__setattr__(self, "_call", getattr(torch.ops.potstill, name).default)
        object.__setattr__(self, "_with_gradient", _with_gradient(self))
        arguments = self._call._schema.arguments
        defaults = tuple((a.name, a.default_value if a.has_default_value() else _REQUIRED) for a in arguments)
        object.__setattr__(self, "_defaults", defaults)
        OPS[name] = self

    @property
    def name(self) -> str:
        """The name before the schema's bracket."""
        return self.schema.partition("(")[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the op through torch's dispatcher, and through autograd if a gradient is needed."""
        if kwargs:
            args = self.positional(*args, **kwargs)
        if torch.is_grad_enabled():
            for position in self.differentiable:
                argument = args[position] if position < len(args) else None
                if argument is not None and argument.requires_grad:
                    return self._with_gradient(*self.positional(*args))
        return self._call(*args)

    def backend(self, device: str, dtype: torch.dtype) -> tuple[str, str]:
        """Which implementation serves ``device`` and ``dtype``, and why.

        >>> from potstill.ops import int8_linear
        >>> int8_linear.backend("cpu", torch.float64)
        ('reference', 'the cpu kernel takes bfloat16, float32; float64 is computed by plain torch')
        """
        kernel = self.kernels.get(device)
        if kernel is None:
            return "reference", f"no {device} kernel; plain torch computes it there"
        if kernel.needs is not None and importlib.util.find_spec(kernel.needs) is None:
            return "reference", f"the {device} kernel needs {kernel.needs}; pip install {kernel.needs}"
        if dtype not in kernel.dtypes:
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in kernel.dtypes))
            given = str(dtype).removeprefix("torch.")
            return "reference", f"the {device} kernel takes {names}; {given} is computed by plain torch"
        note = kernel.note() if kernel.note is not None else ""
        return "kernel", f"the {device} kernel takes {str(dtype).removeprefix('torch.')}" + (note and f"; {note}")

    def _with_fallback(self, kernel: Kernel) -> Callable[..., Any]:
        function, dtypes, reference = kernel.function, kernel.dtypes, self.reference

        def dispatch(first: torch.Tensor, *args: Any) -> Any:
            return (function if first.dtype in dtypes else reference)(first, *args)

        return dispatch

    def on(self, arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """The arguments on a device, weights laid out as its kernels take them."""
        moved = {n: value.to(device) if isinstance(value, torch.Tensor) else value for n, value in arguments.items()}
        return moved if self.lay_out is None else self.lay_out(moved, device.type)

    def positional(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """All arguments in the schema's order, defaults filled in; raises :class:`TypeError` for wrong ones."""
        pop = kwargs.pop
        named = [pop(name, default) for name, default in self._defaults[len(args) :]]
        if kwargs or any(value is _REQUIRED for value in named) or len(args) > len(self._defaults):
            names = [name for name, _ in self._defaults]
            missing = [n for n, v in zip(names[len(args) :], named, strict=False) if v is _REQUIRED]
            raise TypeError(
                f"{self.name}: takes ({', '.join(names)}); got {len(args)} positional arguments, "
                f"unexpected {sorted(kwargs)}, missing {missing}"
            )
        return (*args, *named)

    def shortest(self, **arguments: Any) -> tuple[Any, ...]:
        """The arguments in the schema's order, without those at the end that are the defaults: each costs time.

        >>> from potstill.ops import int8_linear
        >>> one = torch.ones(1)
        >>> int8_linear.shortest(x=one, weight=one, scale=one, bias=None, activation="relu", residual=None)
        (tensor([1.]), tensor([1.]), tensor([1.]), None, 'relu')
        """
        args = list(self.positional(**arguments))
        for _, default in reversed(self._defaults):
            if isinstance(args[-1], torch.Tensor) or args[-1] != default:
                break
            args.pop()
        return tuple(args)


def _under_autocast(op: Op, device: str) -> Callable[..., Any]:
    # An Autocast kernel costs nothing outside torch.autocast, where the dispatcher skips its key.
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def autocast(first: torch.Tensor, *args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op._call(first.to(torch.get_autocast_dtype(device)) if op.autocast else first, *args)

    return autocast


def _with_gradient(op: Op) -> Callable[..., Any]:
    if op.setup_context is not None and op.backward is not None:
        return _autograd(op.name, op._call, op.setup_context, op.backward)

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"{op.name}: no gradient is defined; call it under torch.no_grad()")

    return refuse


def _autograd(
    name: str, call: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    # forward and setup in one: torch's separate setup_context costs ten times as much per call. Only plain functions
    # are captured, so that torch.compile can trace through.
    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = call(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    Gradient.__name__ = Gradient.__qualname__ = f"{name}_with_gradient"
    return Gradient.apply
