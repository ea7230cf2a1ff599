"""Plans without processes: what they say, which layers they would split, how layers are split, what it would cost."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import parallel_models as models
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from potstill.errors import ConversionError
from potstill.parallel import Plan
from potstill.parallel.data import units
from potstill.parallel.estimate import estimate, estimates, measure, table
from potstill.parallel.layout import Split
from potstill.parallel.mesh import place
from potstill.parallel.plan import SCHEDULES, layouts
from potstill.parallel.styles import Entry, dense, is_transposed, join, joined, kind_of, share, stored, take
from potstill.parallel.tensor import find
from potstill.transform.observe import run

pytestmark = pytest.mark.usefixtures("one_thread")

small = st.integers(1, 6)
plans = st.builds(Plan, small, small, small, st.booleans(), small, st.none() | small, st.sampled_from(SCHEDULES))


@given(plans)
@settings(deadline=None)
def test_a_plan_is_its_text(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan


@given(plans, st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_a_plan_fits_only_its_number_of_devices(plan: Plan, world: int) -> None:
    if world == plan.devices:
        plan.check(world)
        return
    with pytest.raises(ValueError, match=f"needs {plan.devices} devices but there are {world}; with {world} fit: "):
        plan.check(world)


@given(st.integers(1, 200), st.integers(1, 3))
@settings(deadline=None)
def test_layouts_are_all_products(world: int, sequence: int) -> None:
    found = list(layouts(world, sequence))
    sizes = range(1, world + 1)
    expected = {(d, t, world // (d * t * sequence)) for d in sizes for t in sizes if world % (d * t * sequence) == 0}
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_the_layouts_that_fit_come_closest_first() -> None:
    with pytest.raises(ValueError, match="with 8 fit: dp=4,tp=2; dp=2,tp=4; dp=2,tp=2,pp=2; ") as caught:
        Plan(data=3, tensor=3).check(8)
    assert str(caught.value).count(";") == 10  # of 10 layouts, and the one before "with"


@given(plans)
@settings(deadline=None)
def test_every_rank_has_a_place_of_its_own(plan: Plan) -> None:
    places = [place(plan, rank) for rank in range(plan.devices)]
    assert len(set(places)) == plan.devices
    assert max(places) == (plan.pipeline - 1, plan.data - 1, plan.sequence - 1, plan.tensor - 1)
    assert all(a.shard + 1 == b.shard for a, b in pairwise(places) if b.shard)  # neighbours


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dp=0", "data is 0, expected a positive integer"),
        ("dp=2,dp=2", "'dp=2' in 'dp=2,dp=2' is not understood"),
        ("ep=2", "'ep=2' in 'ep=2' is not understood"),
        ("dp", "'dp' in 'dp' is not understood"),
        ("shard=1", "'shard=1' in 'shard=1' is not understood"),
        ("", "'' in '' is not understood"),
        ("dp=two", "dp is 'two' in 'dp=two', expected a positive integer"),
        ("dp=-2", "dp is '-2'"),
        ("schedule=zigzag", "schedule is 'zigzag', expected one of gpipe, 1f1b, interleaved"),
    ],
)
def test_texts_that_are_no_plans(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.parse(text)


@pytest.mark.parametrize("size", [True, 2.0, "2", None])
def test_sizes_are_integers(size: object) -> None:
    with pytest.raises(ValueError, match=r"data is .*, expected a positive integer"):
        Plan(data=size)  # type: ignore[arg-type]


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="dp=2 needs a process group; start the script by torchrun"):
        Plan(data=2).apply(models.plain())


def found(model: nn.Module, sample: Tensor, ranks: int = 2, **options: object) -> dict[str, str]:
    splits = find(model, sample, Plan(tensor=ranks), **options).splits  # type: ignore[arg-type]
    return {name: split.how for name, split in splits.items()}


def block_splits(prefix: str, columns: str, rows: str) -> dict[str, str]:
    names = {name: how for how, text in (("column", columns), ("row", rows)) for name in text.split()}
    return {f"{prefix.replace('*', str(i))}.{name}": how for i in range(2) for name, how in names.items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", block_splits("blocks.*", "attention.q attention.k attention.v up", "attention.out down")),
        ("sparse", block_splits("blocks.*", "attention.q attention.k attention.v up", "attention.out down")),
        (
            "bert",
            block_splits(
                "bert.encoder.layer.*",
                "attention.self.query attention.self.key attention.self.value intermediate.dense",
                "attention.output.dense output.dense",
            ),
        ),
        ("gpt2", block_splits("transformer.h.*", "attn.c_attn mlp.c_fc", "attn.c_proj mlp.c_proj")),
        (
            "llama",
            block_splits(
                "model.layers.*",
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj",
                "self_attn.o_proj mlp.down_proj",
            ),
        ),
    ],
)
def test_attention_and_mlp_are_found(name: str, expected: dict[str, str]) -> None:
    model = models.MODELS[name]()
    before = copy.deepcopy(model.state_dict())
    assert found(model, models.data()[0][:2]) == expected
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_queries_keys_and_values_in_one_layer_are_split_by_heads() -> None:
    layout = find(models.MODELS["gpt2"](), models.data()[0][:2], Plan(tensor=2))
    assert layout.splits["transformer.h.0.attn.c_attn"].parts == 3
    assert ("transformer.h.0.attn", "split_size") in layout.attributes


def test_layers_that_read_the_same_share_a_group() -> None:
    splits = find(models.plain(), models.data()[0][:2], Plan(tensor=2)).splits
    q, k, v, up = (splits[f"blocks.0.{name}"].group for name in ("attention.q", "attention.k", "attention.v", "up"))
    assert q == k == v != up


class Leaky(nn.Module):
    """Its layers have the sizes of a pair, but something between or beside them needs all features."""

    def __init__(self, between: Callable[[Tensor], Tensor], beside: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.between, self.beside = nn.Linear(8, 8), nn.Linear(8, 8), between, beside
        nn.init.zeros_(self.second.weight)  # a wrong split of its inputs would not show in its outputs

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        y: Tensor = self.second(self.between(hidden))
        return y + hidden.sum(-1, keepdim=True) if self.beside else y


@pytest.mark.parametrize(
    ("model", "splits"),
    [
        (Leaky(torch.tanh), {"first": "column", "second": "row"}),
        (Leaky(lambda x: x.softmax(-1)), {}),
        (Leaky(lambda x: x / x.norm(dim=-1, keepdim=True)), {}),
        (Leaky(lambda x: x.flip(-1)), {}),
        (Leaky(torch.tanh, beside=True), {}),
    ],
    ids=["fits", "softmax", "norm", "order", "beside"],
)
def test_a_split_is_taken_only_if_it_holds(model: nn.Module, splits: dict[str, str]) -> None:
    layout = find(model, torch.randn(3, 8), Plan(tensor=2))
    assert {name: split.how for name, split in layout.splits.items()} == splits
    assert splits or "no later layer could add up" in layout.reasons["first"]


def test_heads_that_cannot_be_divided_stay_whole_and_say_so() -> None:
    model = models.plain()
    layout = find(model, models.data()[0][:2], Plan(tensor=8))
    assert set(layout.splits) == {f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")}
    assert layout.reasons["blocks.1.attention.out"] == "heads is 4, which cannot be divided among 8"
    assert model.blocks[0].attention.heads == models.HEADS


def test_groups_of_int4_weights_stay_together() -> None:
    layout = find(models.MODELS["int4"](), models.data()[0][:2], Plan(tensor=4))
    assert layout.splits.keys() == {f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")}
    assert layout.reasons["blocks.0.attention.out"] == "64 inputs in groups of 32 cannot be divided among 4"


def test_layers_in_a_row_form_pairs() -> None:
    sizes = [8, 16, 16, 32, 4]
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU(inplace=True))))
    assert found(model, torch.randn(3, 8)) == {"0": "column", "2": "row", "4": "column", "6": "row"}


def test_what_the_user_asks_for() -> None:
    model, x = models.plain(), models.data()[0][:2]
    kept = found(model, x, tensor_plan={"blocks.0.*": "replicate"})
    assert kept.keys() == {name for name in found(model, x) if name.startswith("blocks.1")}
    pair = found(model, x, tensor_plan={"*.up": "column", "*.down": "row", "*attention*": "replicate"})
    assert pair == block_splits("blocks.*", "up", "down")
    for wrong in ({"*.attention.q": "column", "*.attention.out": "row"}, {"*.up": "row", "*.attention.q": "column"}):
        with pytest.raises(ValueError, match="tensor_plan does not give what the model computes: "):
            find(model, x, Plan(tensor=2), wrong)
    with pytest.raises(ConversionError, match="'nothing' matches no layer"):
        find(model, x, Plan(tensor=2), {"nothing": "row"})


def test_a_head_and_what_shares_its_weight_are_split_together() -> None:
    x = models.data()[0][:2]
    tied = find(models.MODELS["gpt2"](), x, Plan(tensor=2), head="lm_head").splits
    assert (tied["lm_head"].how, tied["transformer.wte"].how) == ("column", "vocabulary")
    model = models.plain()
    model.more = nn.Linear(models.WIDTH, models.CLASSES)
    model.more.weight = model.head.weight
    with pytest.raises(ValueError, match="head 'head' shares its weight with 'more', which cannot be split with it"):
        find(model, x, Plan(tensor=2), head="head")


@pytest.mark.parametrize("how", ["column", "row"])
@pytest.mark.parametrize("name", [*models.CONVERSIONS, "gpt2"])
def test_shares_of_a_layer_are_joined_to_it(name: str, how: str) -> None:
    model = models.MODELS[name]()
    layer = model.transformer.h[0].attn.c_attn if name == "gpt2" else model.blocks[0].up
    split = Split("column", 3 if name == "gpt2" else 1) if how == "column" else Split("row")
    kind, saved = kind_of(layer), layer.state_dict()
    whole = dense(kind, saved, is_transposed(layer))
    shares = [share(kind, whole, split, 2, rank) for rank in range(2)]
    assert shares[0]["weight"].numel() == whole["weight"].numel() // 2
    again = joined(kind, shares, split) | ({"bias": whole["bias"]} if how == "row" else {})
    back = stored(kind, again, is_transposed(layer))
    assert back.keys() == saved.keys()
    assert all(torch.equal(back[key], saved[key]) for key in saved)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None)
def test_join_undoes_take(parts: int, ranks: int, width: int) -> None:
    x = torch.randn(2, parts * ranks * width)
    assert torch.equal(join([take(x, 1, parts, ranks, rank) for rank in range(ranks)], 1, parts), x)


def test_layers_that_share_a_weight_stay_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    layout = find(model, torch.randn(3, 8), Plan(tensor=2))
    assert not layout.splits
    assert layout.reasons["0"] == "it shares its weight with 2"


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_an_entry_is_shared_only_by_those_who_see_the_same_tensor(alone: DeviceMesh) -> None:
    entry = Entry(alone)
    entry.users = 2
    x = torch.ones(3, requires_grad=True)
    assert entry(x) is entry(x)
    assert entry(x) is not entry(x * 1)
    with torch.no_grad():
        entry(x)
    assert entry(x).requires_grad
    hidden = x * 1
    entry(hidden)
    hidden.mul_(2)
    entry(hidden).to_local().sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]
    seen = weakref.ref(hidden)
    entry(hidden)  # the last user
    del hidden
    assert seen() is None


def test_blocks_that_share_a_parameter_are_no_units() -> None:
    model = models.plain()
    assert units(model) == list(model.blocks)
    model.blocks[1].norm.weight = model.norm.weight
    assert units(model) == [model.blocks[0]]


def test_memory_is_that_of_the_parameters() -> None:
    model, x = models.plain(), models.data()[0][:2]
    numbers = sum(p.numel() for p in model.parameters())
    of_blocks = sum(p.numel() for p in model.blocks.parameters())
    measured = measure(model, x)
    layout = find(model, x, Plan())

    def of(plan: Plan) -> object:
        return estimate(model, plan, layout, measured, models.ROWS, x)

    whole, sharded = of(Plan(data=2)), of(Plan(data=2, shard=True))
    assert (whole.weights, whole.gradients, whole.optimizer) == (4 * numbers, 4 * numbers, 8 * numbers)
    gathered = max(of_blocks / 2, numbers - of_blocks) * 4
    assert (sharded.weights, sharded.gradients) == (2 * numbers + gathered, 2 * numbers)
    assert of(Plan()).activations == 2 * whole.activations
    assert of(Plan(pipeline=2, micro_batches=4)).idle == pytest.approx(1 / 5)
    assert of(Plan()).sent == 0


def test_activations_are_what_backward_keeps() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    # The input, the result of tanh, which two operations keep as one tensor; weights do not count.
    assert measure(model, torch.randn(3, 8)).saved == 3 * (8 + 16) * 4


def test_auto_takes_the_plan_that_sends_least_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = models.plain(), models.data()[0][:2]
    rows = estimates(model, 4, 8, x)
    fitting = [row for row in rows if row.plan.pipeline == 1]
    roomy = Plan.auto(model, 1 << 40, 4, 8, x)
    assert roomy == min(fitting, key=lambda row: row.sent).plan
    printed = capsys.readouterr().out
    assert printed.strip() == table(rows, 1 << 40).strip()
    assert all(str(row.plan) in printed for row in rows)
    least = min(rows, key=lambda row: row.memory)
    assert Plan.auto(model, int(least.memory) + 1, 4, 8, x).shard or least.plan.pipeline > 1
    with pytest.raises(ValueError, match=r"nothing fits in 1000 bytes on each of 4 devices(.|\n)*MB sent"):
        Plan.auto(model, 1000, 4, 8, x)


def test_a_batch_is_divided_by_rows_or_not_at_all() -> None:
    rows = {row.plan.data for row in estimates(models.plain(), 4, 6, models.data()[0][:2])}
    assert rows == {1, 2}


def test_share_of_one_process_is_everything() -> None:
    batch = (torch.zeros(3, 2), {"y": torch.ones(3)}, "text")
    assert Plan().share(batch)[0] is batch[0]
    assert run(nn.Identity(), Plan().share(batch[0])) is batch[0]
