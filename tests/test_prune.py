"""prune_: what it changes, what it leaves alone and why, and what it says about it."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from potstill import Prune, PruneReport, prune_, quantize_
from potstill.errors import ConversionError
from potstill.nn import MaskedConv2d, MaskedLinear
from potstill.nn.masked import Masked
from potstill.transform.criteria import CRITERIA


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))


def _batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 2, 5, 5), torch.tensor([0, 1, 2, 0, 1, 2])


def _reasons(model: nn.Module, config: Prune | None = None, **arguments: object) -> dict[str, str]:
    report = prune_(model, config or Prune(), **arguments)  # type: ignore[arg-type]
    return {row.names[0]: row.reason for row in report.rows}


def test_parameters_stay_the_same_objects() -> None:
    model = _model()
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    report = prune_(model, Prune())
    after = dict(model.named_parameters())
    assert [type(model[i]) for i in (0, 3, 5)] == [MaskedConv2d, MaskedLinear, MaskedLinear]
    assert all(after[name] is p and torch.equal(p, values[name]) for name, p in before.items())
    assert after.keys() - before.keys() == {"0.mask", "3.mask", "5.mask"}
    assert [row.names for row in report.rows] == [("0",), ("3",), ("5",)]


def test_the_report() -> None:
    model = _model()
    report = prune_(model, Prune(0.5, "2x4"), exclude="5")
    assert isinstance(report, PruneReport)
    first, second, third = report.rows
    assert (first.kind, first.shape, first.action, first.blocks) == ("Conv2d", (4, 18), "pruned", 10)
    assert (second.blocks, second.kept_blocks, second.sparsity) == (36, 18, 0.5)
    assert (third.action, third.reason, third.sparsity, third.shape) == ("kept", "excluded by 5", 0.0, (3, 8))
    zeros = sum(int((~model[i].mask).sum()) for i in (0, 3))
    assert report.sparsity == pytest.approx(zeros / (72 + 288))
    data = json.loads(json.dumps(report.to_dict()))
    assert [row["names"] for row in data["layers"]] == [["0"], ["3"], ["5"]]
    assert (len(report.pruned), len(report.kept)) == (2, 1)
    text = str(report)
    assert "18 of 36" in text
    assert "excluded by 5" in text
    assert "2 of 3 layers pruned; 49" in text or "2 of 3 layers pruned; 50" in text
    assert max(map(len, text.splitlines())) <= 120


def test_gradual_pruning_scores_the_master_weights_anew() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    prune_(model, Prune(0.5, "unstructured"))
    layer, mask = model[0], model[0].mask
    first = mask.clone()
    with torch.no_grad():  # training has made what was masked large
        layer.weight[~first] += 10 * layer.weight[~first].sign()
    row = prune_(model, Prune(0.75, "unstructured")).rows[0]
    assert model[0] is layer
    assert layer.mask is mask
    assert (row.kind, row.sparsity) == ("MaskedLinear", 0.75)
    assert not (mask & first).any(), "those that grew come back, all others go"


def test_training_mode_hooks_random_numbers_and_gradients_are_as_before() -> None:
    model, (x, y) = _model(), _batch()
    model[3].eval()
    model[1].register_forward_hook(lambda *_: None)
    F.cross_entropy(model(x), y).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    state, parameters = torch.get_rng_state(), list(model.parameters())
    for criterion in ("random", "taylor", "wanda", "sparsegpt"):
        prune_(
            model, Prune(0.5, criterion=criterion), [(x, y)], loss=lambda item: F.cross_entropy(model(item[0]), item[1])
        )
        assert [m.training for m in model] == [True, True, True, False, True, True]
        assert torch.equal(torch.get_rng_state(), state)
        assert [len(m._forward_hooks) for m in model] == [0, 1, 0, 0, 0, 0]
        assert not any(m._forward_pre_hooks for m in model)
        kept = [p for p in model.parameters() if p.dtype != torch.bool]
        assert all(a is b for a, b in zip(kept, parameters, strict=True))
        assert all(torch.equal(p.grad, g) for p, g in zip(kept, gradients, strict=True))


def test_losses_in_training_mode_and_frozen_models() -> None:
    """Gradients do not need weights that require them, and loss may be called where gradients are off."""
    model, (x, y) = _model().requires_grad_(False), _batch()
    with torch.no_grad():
        report = prune_(
            model, Prune(criterion="snip"), [(x, y)], loss=lambda item: F.cross_entropy(model(item[0]), item[1])
        )
    assert len(report.pruned) == 3
    assert not any(p.requires_grad for p in model.parameters())


def test_the_same_again() -> None:
    masks = []
    x, y = _batch()
    for _ in range(2):
        torch.manual_seed(3)
        model = _model()
        torch.manual_seed(len(masks))
        loss = lambda item, model=model: F.cross_entropy(model(item[0]), item[1])  # noqa: E731
        prune_(model, Prune(0.6, criterion="taylor", scope="global"), [(x, y)], loss=loss)
        prune_(model, Prune(0.6, "unstructured", "random"))
        masks.append([model[i].mask for i in (0, 3, 5)])
    assert all(map(torch.equal, *masks))


def test_a_layer_that_is_the_model_itself() -> None:
    model = nn.Linear(8, 4)
    weight = model.weight
    prune_(model, Prune(0.5))
    assert type(model) is MaskedLinear
    assert model.weight is weight
    assert model.sparsity == 0.5


def test_a_layer_under_two_names_is_replaced_under_both() -> None:
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    report = prune_(model, Prune(0.5))
    assert report.rows[0].names == ("0", "2")
    assert type(model[0]) is MaskedLinear
    assert model[0] is model[2]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_is_kept_and_why() -> None:
    class Odd(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "head": nn.Linear(4, 5),
            "odd": Odd(4, 4),
            "hooked": nn.Linear(4, 4),
            "parametrised": parametrizations.weight_norm(nn.Linear(4, 4)),
            "circular": nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"),
            "attention": nn.MultiheadAttention(4, 2),
            "lazy": nn.LazyLinear(3),
            "meta": nn.Linear(4, 4, device="meta"),
            "empty": nn.Linear(0, 4),
            "nan": nn.Linear(4, 4),
            "good": nn.Linear(4, 4),
        }
    )
    model["head"].weight = model["embedding"].weight
    model["hooked"].register_forward_hook(lambda *_: None)
    model["nan"].weight.data[0, 0] = torch.nan
    reasons = _reasons(model)
    expected = {
        "head": "weight is tied to embedding.weight",
        "odd": "is a subclass of nn.Linear",
        "hooked": "has forward_hooks",
        "parametrised": "is parametrised",
        "circular": "pads with 'circular', not with zeros",
        "attention.out_proj": "read by nn.MultiheadAttention",
        "lazy": "not initialised yet",
        "meta": "meta device",
        "empty": "has no weights",
        "nan": "NaN or infinite",
        "good": "",
    }
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name], name
        assert (reason == "") == (reasons[name] == "")
    assert [type(m).__name__ for m in model.modules() if isinstance(m, Masked)] == ["MaskedLinear"]


@pytest.mark.usefixtures("quick")
def test_a_quantised_layer_is_refused_and_a_masked_one_is_not_quantised_by_accident() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    quantize_(model, exclude="2", only_if_faster=False)
    reasons = _reasons(model)
    assert "Int8Linear already; prune the float model first" in reasons["0"]
    assert type(model[2]) is MaskedLinear
    quantize_(model, only_if_faster=False)
    assert type(model[2]) is MaskedLinear


def test_inside_torchs_encoder_the_fused_path_is_switched_off() -> None:
    """Its kernels read weights and never call layers."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    x = torch.randn(2, 5, 16)
    prune_(model, Prune(0.5, criterion="wanda"), [x])
    expected = model.train()(x)  # which never takes the fused path
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)
    assert type(model.layers[0].linear1) is MaskedLinear


def test_patterns_that_match_nothing() -> None:
    model = _model()
    with pytest.raises(ConversionError, match="include: 'fc' matches no layer"):
        prune_(model, Prune(), include="fc")
    for _ in range(2):  # the second time it is a MaskedConv2d
        assert _reasons(model, include=nn.Conv2d) == {"0": "", "3": "not in include", "5": "not in include"}
    assert _reasons(model, exclude=["5", nn.Conv2d])["0"] == "excluded by MaskedConv2d"
    assert _reasons(model, include=nn.Linear) == {"0": "not in include", "3": "", "5": ""}
    with pytest.raises(TypeError, match=r"include: expected layer names with wildcards or nn\.Module types, got 5"):
        prune_(model, Prune(), include=[5])  # type: ignore[list-item]


def test_bfloat16_and_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 8), nn.Linear(6, 4)).to(torch.bfloat16)
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    weight = model[0].weight.detach().float().t().clone()
    expected = (weight.abs() * x.float().norm(dim=0)).view(6, 4, 2).mean(2)
    prune_(model, Prune(0.5, "1x2", "wanda"), [x])
    kept = model[0].mask.t().reshape(6, 4, 2)
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(kept[..., 0], kept[..., 1])
    for mine, score in zip(kept[..., 0], expected, strict=True):
        assert score[mine].min() >= score[~mine].max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "expected 0 <= sparsity < 1"),
        ({"sparsity": -0.1}, "expected 0 <= sparsity < 1"),
        ({"sparsity": 0.8, "pattern": "2:4"}, "'2:4' makes 0.5 of the weights zero; leave sparsity out"),
        ({"scope": "model"}, "expected one of 'layer', 'global', 'erk', 'error'"),
        ({"scope": "global", "pattern": "2:4"}, "as sparse in every layer"),
        ({"criterion": "size"}, "one of magnitude, movement, random, snip, sparsegpt, taylor, wanda"),
        ({"criterion": "sparsegpt", "pattern": "4x4"}, "solves each output by itself"),
        ({"criterion": "wanda", "scope": "global"}, "use scope 'layer', 'erk' or 'error'"),
    ],
)
def test_configs_that_make_no_sense(arguments: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CRITERIA, "squared norm", raising=False)  # what an example in docs/ leaves behind
    with pytest.raises(ValueError, match=message):
        Prune(**arguments)


def test_sparsity_that_agrees_with_the_pattern() -> None:
    assert Prune(0.5, "2:4") == Prune(pattern="2:4")
    assert Prune().sparsity == 0.8


def test_other_arguments() -> None:
    with pytest.raises(TypeError, match=r"expected a potstill\.Prune"):
        prune_(_model(), 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scope 'error' measures the model's output; pass data"):
        prune_(_model(), Prune(scope="error"))
    with pytest.raises(ValueError, match="can be run over only once"):
        prune_(_model(), Prune(scope="error", criterion="wanda"), iter([_batch()]))
    assert prune_(nn.ReLU(), Prune()).rows == ()
