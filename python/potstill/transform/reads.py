"""Sees which layers are read by code that does not call them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class ForeignReads(TorchFunctionMode):
    """Inside, notes in ``found`` the modules whose tensors go to a torch function while none of their owners runs.

    ``tensors``: each module, and those of its parameters that matter. A parameter of several modules may be read by
    any. Asking for a size or a device is no reading.

    >>> import torch
    >>> embedding = nn.Embedding(5, 3)
    >>> with ForeignReads([(embedding, [embedding.weight])]) as reads:
    ...     hidden = embedding(torch.tensor([1]))
    ...     before = len(reads.found)
    ...     logits = hidden @ embedding.weight.t()  # a head that never calls the embedding
    >>> before, reads.found == {embedding}
    (0, True)
    """

    def __init__(self, tensors: Iterable[tuple[nn.Module, Iterable[Tensor]]]) -> None:
        super().__init__()
        self.found: set[nn.Module] = set()
        self._owners: dict[int, list[nn.Module]] = {}
        for module, own in tensors:
            for tensor in own:
                self._owners.setdefault(id(tensor), []).append(module)
        self._running: dict[nn.Module, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> ForeignReads:
        for module in {module for owners in self._owners.values() for module in owners}:
            self._running[module] = 0
            self._handles.append(module.register_forward_pre_hook(self._starts))
            self._handles.append(module.register_forward_hook(self._ends, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) for value in tree_leaves(result)):
            for value in tree_leaves((args, kwargs or {})):
                owners = self._owners.get(id(value), ())
                if not any(self._running[module] for module in owners):
                    self.found.update(owners)
        return result

    def _starts(self, module: nn.Module, _: Any) -> None:
        self._running[module] += 1

    def _ends(self, module: nn.Module, _: Any, __: Any) -> None:
        self._running[module] -= 1
