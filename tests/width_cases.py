"""Models, and teachers made of a smaller model in such a way that nothing is lost when they are cut back to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)


@dataclass(frozen=True)
class Role:
    """What an axis indexes: ``kind`` of features, each with ``size`` numbers in a row, all that ``parts`` times.

    ``reads``: the tensor takes the features in, rather than giving them.
    """

    kind: str
    reads: bool = False
    size: int = 1
    parts: int = 1


H, H_IN = Role("hidden"), Role("hidden", reads=True)
U, U_IN = Role("units"), Role("units", reads=True)
P, P_IN = Role("pooled"), Role("pooled", reads=True)
Roles = Mapping[str, tuple[Role, ...]]  # by a pattern of the names, the roles of the dimensions; the first that fits


@dataclass(frozen=True)
class Case:
    """A family of models: ``build(big)``, an item of a loader, and what the axes are."""

    build: Callable[[bool], nn.Module]
    sample: Callable[[], Any]
    roles: Roles


def widen(small: nn.Module, teacher: nn.Module, roles: Roles, *, both: bool = False, heads: int = 0) -> None:
    """Makes ``teacher`` compute what ``small`` does, its features in random places.

    Hidden features are there twice, so that means and variances over them stay; what reads them reads one of the two,
    or, with ``both``, a part of each. Of other features those that are too many are noise that nothing reads. With
    ``heads`` there are as many of these in both models, and the teacher's have more dimensions, which are 0.
    """
    maps: dict[str, tuple[Tensor, Tensor]] = {}
    given = small.state_dict()
    for name, tensor in teacher.state_dict().items():
        value = given[name]
        for dim in range(tensor.dim()):
            if value.shape[dim] < tensor.shape[dim]:
                role = next(roles for pattern, roles in roles.items() if re.search(pattern, name))[dim]
                if heads and role.kind == "heads":
                    role = replace(role, size=1)
                group = _group(name, role)
                n, m = (axis.shape[dim] // role.parts // role.size for axis in (value, tensor))
                if group not in maps:
                    maps[group] = _map(n, m, role.kind, both, heads)
                value = _widened(value, dim, n, role, *maps[group], inside=bool(heads))
        tensor.copy_(value)


def _group(name: str, role: Role) -> str:
    layer = re.search(r"(\d+)\.", name)  # all but the hidden features are a layer's own
    return role.kind + (layer.group(1) if layer and role.kind in ("units", "heads") else "")


def _map(n: int, m: int, kind: str, both: bool, heads: int) -> tuple[Tensor, Tensor]:
    # Which of n features each of m is, in random order, and which share of it is read from there.
    if kind == "hidden":
        return _twice(n, m, both)
    if kind != "heads" or not heads:
        return _once(n, m)
    each = [_once(n // heads, m // heads) for _ in range(heads)]
    return torch.cat([index + n // heads * h for h, (index, _) in enumerate(each)]), torch.cat([s for _, s in each])


def _widened(value: Tensor, dim: int, n: int, role: Role, index: Tensor, share: Tensor, inside: bool) -> Tensor:
    index = (index[:, None] * role.size + torch.arange(role.size)).reshape(-1)
    index = torch.cat([index + part * n * role.size for part in range(role.parts)])
    share = share.repeat_interleave(role.size).repeat(role.parts).view([-1] + [1] * (value.dim() - dim - 1))
    value = value.index_select(dim, index)
    if role.reads or (inside and role.kind == "heads"):
        return value * share
    if role.kind != "hidden" and value.is_floating_point():
        return torch.where(share == 0, value * (0.5 + torch.rand(value.shape)), value)
    return value


def _once(n: int, m: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(m)
    return torch.cat([torch.arange(n), torch.randint(n, (m - n,))])[order], (torch.arange(m) < n).float()[order]


def _twice(n: int, m: int, both: bool) -> tuple[Tensor, Tensor]:
    assert m == 2 * n
    order = torch.randperm(m)
    share = torch.rand(n) * 0.8 + 0.1 if both else torch.randint(2, (n,)).float()
    return torch.arange(n).repeat(2)[order], torch.cat([share, 1 - share])[order]


def lively(model: nn.Module) -> nn.Module:
    """The model with random vectors too, so that no norm, bias or statistic is trivial, and with larger matrices."""
    for name, tensor in model.state_dict().items():
        if "var" in name or (tensor.dim() == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.3)
    return model.eval()


def _tokens(count: int = 40) -> Any:
    return lambda: (torch.randint(count, (64, 9)), torch.zeros(64))


def bert(big: bool) -> nn.Module:
    sizes = {"hidden_size": 16 if big else 8, "intermediate_size": 24 if big else 10}
    config = BertConfig(vocab_size=40, **sizes, num_hidden_layers=2, num_attention_heads=4 if big else 2, num_labels=3)
    return BertForSequenceClassification(config)


def gpt2(big: bool) -> nn.Module:
    sizes = {"n_embd": 16 if big else 8, "n_inner": 24 if big else 10, "n_head": 4 if big else 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=12, **sizes, n_layer=2, tie_word_embeddings=False))


def llama(big: bool) -> nn.Module:
    sizes = {"hidden_size": 16 if big else 8, "intermediate_size": 24 if big else 10}
    heads = {"num_attention_heads": 8 if big else 4, "num_key_value_heads": 4 if big else 2, "head_dim": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, **heads, num_hidden_layers=2))


def vit(big: bool) -> nn.Module:
    sizes = {"hidden_size": 16 if big else 8, "intermediate_size": 24 if big else 10}
    heads = 4 if big else 2
    config = ViTConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=heads, image_size=8, patch_size=2, num_labels=3
    )
    return ViTForImageClassification(config)


class Encoder(nn.Module):
    """torch's own encoder between an embedding and a head."""

    def __init__(self, hidden: int, heads: int, units: int, norm_first: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, hidden)
        layer = nn.TransformerEncoderLayer(hidden, heads, units, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(hidden, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(self.tokens(ids)))
        return y


def plain_cnn(big: bool) -> nn.Module:
    n, m, units = (12, 16, 20) if big else (6, 8, 10)
    return nn.Sequential(
        nn.Conv2d(1, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(n, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(m * 4, units), nn.Tanh(), nn.Linear(units, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """x + what an inverted bottleneck with a depthwise convolution makes of it."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depth, self.bn2 = nn.Conv2d(inner, inner, 3, padding=1, groups=inner), nn.BatchNorm2d(inner)
        self.reduce = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.expand(x)))
        y = x + self.reduce(nn.functional.hardswish(self.bn2(self.depth(y))))
        return y


def residual_cnn(big: bool) -> nn.Module:
    n, inner = (8, 24) if big else (4, 10)
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(
        nn.Conv2d(1, n, 3), Residual(n, inner), Residual(n, inner), pool, nn.Flatten(), nn.Linear(n, 3)
    )


def _images() -> Any:
    return torch.randn(16, 1, 8, 8), torch.zeros(16)


def _attention(head: int) -> tuple[Role, Role]:
    return Role("heads", size=head), Role("heads", reads=True, size=head)


A, A_IN = _attention(4)
CASES = {
    "bert": Case(
        bert,
        _tokens(),
        {
            r"embeddings.*embeddings\.weight": (H, H),
            r"(query|key|value)\.": (A, H_IN),
            r"attention\.output\.dense": (H, A_IN),
            r"intermediate": (U, H_IN),
            r"\d\.output\.dense": (H, U_IN),
            r"pooler": (P, H_IN),
            r"classifier": (H, P_IN),
            r"": (H,),
        },
    ),
    "gpt2": Case(
        gpt2,
        _tokens(),
        {
            r"wte|wpe": (H, H),
            r"c_attn\.weight": (H_IN, Role("heads", size=4, parts=3)),
            r"c_attn\.bias": (Role("heads", size=4, parts=3),),
            r"attn\.c_proj\.weight": (A_IN, H),
            r"c_fc\.weight": (H_IN, U),
            r"c_fc\.bias": (U,),
            r"mlp\.c_proj\.weight": (U_IN, H),
            r"lm_head": (H, H_IN),
            r"": (H,),
        },
    ),
    "llama": Case(
        llama,
        _tokens(),
        {
            r"embed_tokens": (H, H),
            r"q_proj": (Role("heads", size=8), H_IN),
            r"(k|v)_proj": (A, H_IN),
            r"o_proj": (H, Role("heads", reads=True, size=8)),
            r"(gate|up)_proj": (U, H_IN),
            r"down_proj": (H, U_IN),
            r"lm_head": (H, H_IN),
            r"": (H,),
        },
    ),
    "vit": Case(
        vit,
        lambda: (torch.randn(16, 3, 8, 8), torch.zeros(16)),
        {
            r"cls_token|position_embeddings": (H, H, H),
            r"patch": (H, H, H, H),
            r"(q|k|v)_proj": (A, H_IN),
            r"o_proj": (H, A_IN),
            r"fc1": (U, H_IN),
            r"fc2": (H, U_IN),
            r"classifier": (H, H_IN),
            r"": (H,),
        },
    ),
    **{
        f"torch {'pre' if first else 'post'}-norm": Case(
            lambda big, first=first: Encoder(*((16, 4, 24) if big else (8, 2, 10)), norm_first=first),
            _tokens(),
            {
                r"tokens": (H, H),
                r"in_proj": (Role("heads", size=4, parts=3), H_IN),
                r"out_proj": (H, A_IN),
                r"linear1": (U, H_IN),
                r"linear2": (H, U_IN),
                r"head": (H, H_IN),
                r"": (H,),
            },
        )
        for first in (False, True)
    },
    "cnn": Case(
        plain_cnn,
        _images,
        {
            r"^[01]\.": (Role("first"),),
            r"^4\.": (Role("second"), Role("first", reads=True)),
            r"^5\.": (Role("second"),),
            r"^9\.": (Role("third"), Role("second", reads=True, size=4)),
            r"^11\.": (Role("third"), Role("third", reads=True)),
        },
    ),
    "residual cnn": Case(
        residual_cnn,
        _images,
        {
            r"^0\.": (H,),
            r"expand": (U, H_IN),
            r"bn|depth": (U,),
            r"reduce": (H, U_IN),
            r"^5\.": (H, H_IN),
        },
    ),
}
