"""Makes a model smaller and faster with int8 layers, reports what that did, saves it and loads it again.

Run: python examples/swap_int8.py
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import potstill


class Block(nn.Module):
    """A transformer block, batch x length x width -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        x = x + self.out(F.scaled_dot_product_attention(*qkv).transpose(-3, -2).flatten(-2))
        return x + self.mlp(self.before_mlp(x))


class Classifier(nn.Module):
    """Tokens, batch x length -> one score per class."""

    def __init__(self, tokens: int = 1000, width: int = 384, blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width, heads=6) for _ in range(blocks)))
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens)).mean(dim=1))


def main() -> None:
    torch.manual_seed(0)
    model = Classifier().eval()  # in earnest: your trained model
    tokens = torch.randint(1000, (4, 32))  # in earnest: a typical batch

    with torch.inference_mode():
        before = model(tokens)
        report = potstill.quantize_(model, sample_input=tokens, exclude="head")
        after = model(tokens)
    print(report)
    print(f"relative change of the scores: {float((after - before).norm() / before.norm()):.2%}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "classifier.safetensors"
        potstill.save(model, path)
        print(f"saved: {path.stat().st_size / 1e6:.1f} MB")
        restored = potstill.load(Classifier(), path).eval()
    with torch.inference_mode():
        print("restored model gives the same scores:", torch.equal(restored(tokens), after))


if __name__ == "__main__":
    main()
