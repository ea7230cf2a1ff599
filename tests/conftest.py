"""Every test starts from the same seed and leaves threads and instruction set as it found them."""

from collections.abc import Iterator

import pytest
import torch

from potstill import _C


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    isa, threads = _C.isa(), torch.get_num_threads()
    torch.manual_seed(0)
    yield
    _C.use_isa(isa)
    torch.set_num_threads(threads)
