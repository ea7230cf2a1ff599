"""Every divergence and the top-k teacher: gradients against autograd, exact edges, and what goes wrong elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kd_losses import check, gradient_of, labels, logits, options_of
from torch import Tensor

from potstill import _C
from potstill.nn import KDLoss
from potstill.ops import kd_loss, top_k
from potstill.ops.divergence import DIVERGENCES
from potstill.ops.kd_loss import row_losses
from potstill.ops.topk import REST

BETA = {"jsd": 0.3, "dkd": 2.0}
# A logarithm of p / q is a difference of logits: 24 bits of the logits, not of the difference.
GRADIENT, LOSS = 1e-5, 4e-6


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


def loss_of(divergence: str, temperature: float = 2.0, alpha: float = 0.6, **options: Any) -> KDLoss:
    return KDLoss(temperature, alpha, divergence=divergence, beta=BETA.get(divergence), **options)


def both(rows: int, classes: int, loss: KDLoss) -> tuple[Tensor, Tensor]:
    """Value and gradient of random logits, as the tests compare them before and after a change."""
    student = logits(rows, classes).requires_grad_()
    value = loss(student, logits(rows, classes, seed=1), labels(rows, classes))
    value.backward()
    assert student.grad is not None
    return value.detach(), student.grad


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_value_and_gradient(isa: str, divergence: str, temperature: float, alpha: float) -> None:
    loss = loss_of(divergence, temperature, alpha, label_smoothing=0.1, reduction="none")
    check(logits(7, 2100), logits(7, 2100, seed=1), labels(7, 2100, ignored=2), loss, GRADIENT, LOSS)


@settings(deadline=None, max_examples=150)
@given(
    divergence=st.sampled_from(DIVERGENCES),
    rows=st.integers(0, 4),
    classes=st.integers(2, 70) | st.sampled_from([1023, 1024, 1025, 2049, 5003]),
    teacher=st.integers(2, 70) | st.sampled_from([1024, 1025, 4000]),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0, 7.0]),
    alpha=st.sampled_from([0.0, 0.25, 1.0]),
    scale=st.sampled_from([1e-2, 1.0, 10.0]),
    half=st.tuples(st.booleans(), st.booleans()),
)
def test_any_shape_and_option(
    divergence: str,
    rows: int,
    classes: int,
    teacher: int,
    temperature: float,
    alpha: float,
    scale: float,
    half: tuple[bool, bool],
) -> None:
    s, t = logits(rows, classes, scale=scale), logits(rows, teacher, seed=1, scale=scale)
    s, t = s.bfloat16() if half[0] else s, t.bfloat16() if half[1] else t
    loss = loss_of(divergence, temperature, alpha, reduction="none")
    check(s, t, labels(rows, classes, ignored=rows // 3), loss, 4e-3 if half[0] else GRADIENT, 2 * LOSS)


@settings(deadline=None, max_examples=100)
@given(
    rest=st.sampled_from(REST),
    divergence=st.sampled_from(["forward_kl", "soft_ce"]),
    classes=st.integers(2, 70) | st.sampled_from([1024, 1025, 5003]),
    k=st.integers(1, 40),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 7.0]),
    alpha=st.sampled_from([0.25, 1.0]),
    scale=st.sampled_from([1e-2, 1.0, 10.0]),
)
def test_any_top_k(
    rest: str, divergence: str, classes: int, k: int, temperature: float, alpha: float, scale: float
) -> None:
    log_probs, indices = top_k(logits(3, classes, seed=1, scale=scale), min(k, classes), temperature)
    loss = KDLoss(temperature, alpha, divergence=divergence, rest=rest, reduction="none")
    s = logits(3, classes, scale=scale)
    check(s, log_probs, labels(3, classes), loss, GRADIENT, 2 * LOSS, teacher_indices=indices)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_definition_in_the_words_of_the_papers(divergence: str) -> None:
    s, t, y = logits(9, 40).double(), logits(9, 40, seed=1).double(), labels(9, 40)
    q, p, beta = (s / 2).softmax(-1), (t / 2).softmax(-1), BETA.get(divergence, 0.0)
    m = beta * p + (1 - beta) * q
    own = F.one_hot(y, 40).bool()
    q_y, p_y = q[own], p[own]
    others_q, others_p = q[~own].view(9, 39) / (1 - q_y)[:, None], p[~own].view(9, 39) / (1 - p_y)[:, None]

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    expected = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "soft_ce": -(p * q.log()).sum(-1),
        "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m),
        "tv": 0.5 * (p - q).abs().sum(-1),
        "dkd": p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log() + beta * kl(others_p, others_q),
        "mse": ((s - t) ** 2).mean(-1) / 4,
    }
    rows = row_losses(s, t, options_of(loss_of(divergence, 2.0, 1.0), y))
    torch.testing.assert_close(rows, 4 * expected[divergence])


def test_dkd_with_the_weights_of_a_divergence_is_one() -> None:
    # KL = target part + (1 - p_y) times the others' part: with one label in every row p_y is the same for all.
    t = logits(1, 30, seed=1).expand(5, 30)
    s, y = logits(5, 30), torch.full((5,), 3)
    beta = 1.0 - float(t[0].softmax(-1)[3])
    dkd = KDLoss(1.0, divergence="dkd", beta=beta)(s, t, y)
    torch.testing.assert_close(dkd, KDLoss(1.0)(s, t))


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "soft_ce"])
def test_one_distribution_has_no_divergence(isa: str, divergence: str) -> None:
    student = logits(4, 3000).requires_grad_()
    loss = loss_of(divergence, 3.0, 1.0)(student, student.detach() + 0.0, labels(4, 3000))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert student.grad is not None
    # For tv the sign of equal probabilities is 0: elsewhere it is -1, and the gradient that of a distance.
    assert float(student.grad.abs().max()) < 1e-8


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
def test_small_divergences_keep_their_digits(divergence: str) -> None:
    # Late in training p and q differ by a thousandth; sums that cancel would have nothing left.
    teacher = logits(8, 3000)
    check(teacher + 1e-3 * logits(8, 3000, seed=1), teacher, labels(8, 3000), loss_of(divergence, 2.0, 1.0), 1e-6)
    student = (teacher + 1e-2 * logits(8, 3000, seed=1)).double().requires_grad_()
    row_losses(student, teacher.double(), options_of(loss_of(divergence, 2.0, 1.0), labels(8, 3000))).sum().backward()
    given = gradient_of(
        student.detach().float(), lambda s: 8 * loss_of(divergence, 2.0, 1.0)(s, teacher, labels(8, 3000))
    )
    assert student.grad is not None
    assert float((given - student.grad).norm() / student.grad.norm()) < 2e-4


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_classes_masked_in_both_count_as_absent(isa: str, divergence: str, temperature: float) -> None:
    student, teacher, target = logits(5, 3000), logits(5, 3000, seed=1), labels(5, 1000) * 3
    kept = torch.arange(0, 3000, 3)
    masked = torch.full((5, 3000), -math.inf).index_copy(1, kept, student[:, kept]).requires_grad_()
    hidden = torch.full((5, 3000), -math.inf).index_copy(1, kept, teacher[:, kept])
    few = student[:, kept].requires_grad_()
    loss = loss_of(divergence, temperature)
    value, expected = loss(masked, hidden, target), loss(few, teacher[:, kept], target // 3)
    value.backward()
    expected.backward()
    assert masked.grad is not None
    assert few.grad is not None
    assert float(masked.grad[:, 1::3].abs().max()) == 0.0
    if divergence == "mse":  # a mean over all columns
        return
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(masked.grad[:, kept], few.grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher_classes", [700, 1024, 1700])
def test_columns_that_one_side_lacks_are_no_part_of_it(isa: str, divergence: str, teacher_classes: int) -> None:
    # Elsewhere the shorter side is padded with logits of 0, which are real probabilities.
    student, teacher = logits(5, 1100).requires_grad_(), logits(5, teacher_classes, seed=1)
    common, target = min(1100, teacher_classes), labels(5, 600)
    soft, hard = loss_of(divergence, 2.0, 1.0), KDLoss(alpha=0.0)
    value = loss_of(divergence, 2.0, 0.6)(student, teacher, target)
    value.backward()
    cut = student.detach()[:, :common].contiguous().requires_grad_()
    expected = 0.6 * soft(cut, teacher[:, :common].contiguous(), target)
    expected.backward()
    plain = student.detach().requires_grad_()
    rest = 0.4 * hard(plain, plain.detach(), target)
    rest.backward()
    torch.testing.assert_close(value, expected + rest)
    assert student.grad is not None
    assert plain.grad is not None
    assert cut.grad is not None
    torch.testing.assert_close(student.grad, plain.grad + F.pad(cut.grad, (0, 1100 - common)), rtol=1e-5, atol=1e-8)


def test_dkd_of_a_label_that_the_teacher_lacks_is_the_whole_divergence() -> None:
    student, teacher = logits(4, 50), logits(4, 30, seed=1)
    dkd = KDLoss(2.0, divergence="dkd", beta=1.0)(student, teacher, torch.full((4,), 40))
    torch.testing.assert_close(dkd, KDLoss(2.0)(student, teacher))


def test_probabilities_of_one_and_of_nothing(isa: str) -> None:
    # q and p so far apart that each underflows where the other is: logarithms of sums of both stay finite.
    student = torch.tensor([[300.0, 0.0, -300.0, 1.0]])
    teacher = torch.tensor([[-300.0, 0.0, 300.0, -1.0]])
    for divergence, expected in (("jsd", -0.3 * math.log(0.3) - 0.7 * math.log(0.7)), ("tv", 1.0)):
        leaf = student.clone().requires_grad_()
        value = loss_of(divergence, 1.0, 1.0)(leaf, teacher)
        value.backward()
        assert value.item() == pytest.approx(expected, rel=1e-6)
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert loss_of("reverse_kl", 1.0, 1.0)(student, teacher).item() == pytest.approx(600.0)
    sure = torch.tensor([[40.0, 0.0, 0.5]])
    dkd = gradient_of(sure, lambda s: loss_of("dkd", 1.0, 1.0)(s, sure + torch.tensor([1.0, 0, 0]), torch.tensor([0])))
    assert dkd.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_rows_are_seen_and_stay_where_they_are(isa: str, divergence: str) -> None:
    for which in (0, 1):
        pair = [logits(4, 1500), logits(4, 1500, seed=1)]
        pair[which][2, 1400] = math.nan
        leaf = pair[0].requires_grad_()
        value = loss_of(divergence, reduction="none")(leaf, pair[1], labels(4, 1000))
        value.sum().backward()
        assert leaf.grad is not None
        assert value.isnan().tolist() == [False, False, True, False]
        assert leaf.grad.isnan().any(dim=1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weights_and_normalizer(divergence: str) -> None:
    student, teacher, target = logits(6, 1100), logits(6, 1100, seed=1), labels(6, 1100, ignored=1)
    student[2] = math.nan
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 3.0])
    rows = loss_of(divergence, reduction="none")(student, teacher, target)
    expected = (rows * weight)[[0, 1, 3, 4, 5]].sum()
    torch.testing.assert_close(loss_of(divergence)(student, teacher, target, row_weight=weight), expected / 5)
    of_whole = loss_of(divergence)(student, teacher, target, row_weight=weight, normalizer=40)
    torch.testing.assert_close(of_whole, expected / 40)
    leaf = student.clone().requires_grad_()
    loss_of(divergence, reduction="sum")(leaf, teacher, target, row_weight=weight).backward()
    assert leaf.grad is not None
    assert float(leaf.grad[[0, 2]].abs().max()) == 0.0
    assert leaf.grad.isfinite().all()
    nothing = loss_of(divergence)(student[:1], teacher[:1], target[:1], normalizer=torch.tensor(0))
    assert nothing.item() == 0.0


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("sizes", [(3, 5), (1, 1, 6), (8,)])
def test_parts_of_a_batch_add_up_to_the_batch(divergence: str, sizes: tuple[int, ...]) -> None:
    student, teacher, target = logits(8, 300), logits(8, 300, seed=1), labels(8, 300, ignored=3)
    loss, valid = loss_of(divergence), torch.tensor(5)
    whole = gradient_of(student, lambda s: loss(s, teacher, target))
    leaf, total = student.clone().requires_grad_(), 0.0
    for s, t, y in zip(leaf.split(sizes), teacher.split(sizes), target.split(sizes), strict=True):
        part = loss(s, t, y, normalizer=valid)
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss(student, teacher, target).item(), rel=1e-6)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, whole, rtol=1e-6, atol=1e-9)


def test_top_k_of_all_classes_is_the_whole_teacher(isa: str) -> None:
    student, teacher = logits(5, 300), logits(5, 300, seed=1)
    log_probs, indices = top_k(teacher, 300, 2.0)
    whole = gradient_of(student, lambda s: KDLoss(2.0)(s, teacher))
    for rest in REST:
        loss = KDLoss(2.0, rest=rest)
        torch.testing.assert_close(loss(student, log_probs, teacher_indices=indices), KDLoss(2.0)(student, teacher))
        given = gradient_of(student, lambda s, loss=loss: loss(s, log_probs, teacher_indices=indices))
        torch.testing.assert_close(given, whole, rtol=1e-4, atol=1e-7)


def test_tail_is_a_divergence_of_buckets(isa: str) -> None:
    student, teacher = logits(5, 3000), logits(5, 3000, seed=1)
    log_probs, indices = top_k(teacher, 20)
    q, p = student.double().softmax(-1).gather(-1, indices), log_probs.double().exp()
    q, p = torch.cat((q, 1 - q.sum(-1, True)), -1), torch.cat((p, 1 - p.sum(-1, True)), -1)
    expected = (p * (p / q).log()).sum(-1).mean().float()
    torch.testing.assert_close(KDLoss()(student, log_probs, teacher_indices=indices), expected)


def test_tail_of_a_sure_student_keeps_its_digits(isa: str) -> None:
    # 1 - Q is 1e-9 here: below float32's resolution of 1, and what the tail's gradient divides by.
    student = torch.zeros(1, 1000)
    student[0, :3] = torch.tensor([28.0, 27.0, 26.0])
    log_probs, indices = torch.tensor([[0.5, 0.3, 0.15]]).log(), torch.tensor([[0, 1, 2]])
    check(student, log_probs, None, KDLoss(1.0), GRADIENT, LOSS, teacher_indices=indices)


@pytest.mark.parametrize("rest", REST)
def test_classes_given_twice_add_up(isa: str, rest: str) -> None:
    # Elsewhere one of them wins, by chance.
    student, loss = logits(2, 50), KDLoss(2.0, rest=rest)
    once = (torch.tensor([[0.5, 0.2], [0.3, 0.1]]).log(), torch.tensor([[7, 3], [49, 0]]))
    twice = (
        torch.tensor([[0.3, 0.2, 0.2, 0.0], [0.1, 0.1, 0.1, 0.1]]).log(),
        torch.tensor([[7, 3, 7, 11], [49, 49, 0, 49]]),
    )
    grads = [gradient_of(student, lambda s, t=t, i=i: loss(s, t, teacher_indices=i)) for t, i in (once, twice)]
    torch.testing.assert_close(grads[0], grads[1])
    values = [loss(student, t, teacher_indices=i) for t, i in (once, twice)]
    torch.testing.assert_close(values[0], values[1])


def test_partial_pulls_towards_the_given_classes() -> None:
    # d/ds of sum p_j (ln p_j - ln q_j) over the given classes is P q - p, not q - p.
    student = logits(3, 40).double().requires_grad_()
    log_probs, indices = top_k(logits(3, 40, seed=1).double(), 4)
    q = student.log_softmax(-1).gather(-1, indices)
    (log_probs.exp() * (log_probs - q)).sum().backward()
    loss = KDLoss(1.0, rest="partial", reduction="sum")
    given = gradient_of(student.detach().float(), lambda s: loss(s, log_probs.float(), teacher_indices=indices))
    assert student.grad is not None
    torch.testing.assert_close(given, student.grad.float())


def test_stored_top_k_may_be_narrow() -> None:
    student, teacher = logits(5, 300), logits(5, 300, seed=1)
    log_probs, indices = top_k(teacher, 20)
    expected = KDLoss()(student, log_probs, teacher_indices=indices)
    for dtype, error in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        given = KDLoss()(student, log_probs.to(dtype), teacher_indices=indices.int())
        assert given.item() == pytest.approx(expected.item(), rel=error)
        assert given.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_indices": torch.tensor([[0, 50]])}, "class 50; expected 0 to 49"),
        ({"teacher_indices": torch.tensor([[-1, 3]])}, "class -1; expected 0 to 49"),
        ({"teacher_indices": torch.tensor([[0, 1, 2]])}, "must be equal"),
        ({"teacher_indices": torch.tensor([[0.0, 1.0]])}, "expected integers"),
        ({"teacher": torch.tensor([[3.2, -1.0]])}, "log-probability 3.2; expected at most 0"),
        ({"divergence": "jsd"}, "jsd needs the teacher's logits"),
        ({"rest": "nothing"}, "rest is 'nothing'"),
    ],
)
def test_top_k_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments = {"teacher": torch.tensor([[-0.5, -1.0]]), "teacher_indices": torch.tensor([[0, 1]])} | change
    with pytest.raises(ValueError, match=message):
        kd_loss(torch.zeros(1, 50), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence is 'kl'; expected one of forward_kl"),
        ({"divergence": "jsd", "beta": 1.0}, "beta is 1.0; the jsd takes a number between 0 and 1"),
        ({"divergence": "dkd", "beta": -1.0}, "beta is -1.0; dkd takes"),
        ({"divergence": "tv", "beta": 0.5}, "beta is 0.5, but tv has none"),
        ({"rest": "tails"}, "rest is 'tails'; expected one of tail"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KDLoss(**options)


@pytest.mark.parametrize(
    ("loss", "tensors", "message"),
    [
        (KDLoss(divergence="dkd"), {}, "the divergence is dkd but target is None"),
        (KDLoss(), {"row_weight": torch.ones(4)}, r"row_weight has shape \[4\]"),
        (KDLoss(), {"row_weight": torch.ones(3, requires_grad=True)}, "row_weight requires a gradient"),
        (KDLoss(), {"normalizer": torch.ones(2)}, "normalizer has shape"),
        (KDLoss(reduction="sum"), {"normalizer": 3}, "normalizer divides a mean, but reduction is 'sum'"),
    ],
)
def test_tensors_that_do_not_fit(loss: KDLoss, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(3, 20), torch.zeros(3, 20), **tensors)


def test_dkd_needs_two_classes() -> None:
    with pytest.raises(ValueError, match="at least 2 classes"):
        KDLoss(divergence="dkd")(torch.zeros(3, 5), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch's own doing
def test_compiles_whole(divergence: str) -> None:
    loss, weight = loss_of(divergence), torch.rand(5)

    def step(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return loss(student * 2.0, teacher, target, row_weight=weight, normalizer=3) * 3.0

    compiled: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments = logits(5, 60, seed=1), labels(5, 60)
    torch.testing.assert_close(
        gradient_of(logits(5, 60), lambda s: compiled(s, *arguments)),
        gradient_of(logits(5, 60), lambda s: step(s, *arguments)),
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_same_bits_again_and_with_other_threads(divergence: str) -> None:
    torch.set_num_threads(1)
    once = both(64, 1100, loss_of(divergence))
    torch.set_num_threads(2)
    for again, expected in zip(both(64, 1100, loss_of(divergence)), once, strict=True):
        assert torch.equal(again, expected)


def test_repr() -> None:
    assert repr(KDLoss(divergence="jsd")) == "KDLoss(divergence='jsd', temperature=1.0, alpha=1.0, beta=0.5)"
    assert repr(KDLoss(2.0, rest="partial")) == "KDLoss(temperature=2.0, alpha=1.0, rest='partial')"


@pytest.mark.parametrize("divergence", ["forward_kl", "soft_ce"])
def test_nan_log_probability_is_seen(divergence: str) -> None:
    log_probs, indices = torch.tensor([[-0.5, math.nan, -3.0]]), torch.tensor([[4, 7, 9]])
    for dtype in (torch.float32, torch.float64):
        value = KDLoss(divergence=divergence)(logits(1, 50).to(dtype), log_probs, teacher_indices=indices)
        assert value.isnan()


def test_probabilities_that_underflow_count_for_nothing() -> None:
    student, teacher = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[900.0, 899.0, -900.0]])
    for dtype in (torch.float32, torch.float64):
        value = KDLoss()(student.to(dtype), teacher.to(dtype))
        few = KDLoss()(student[:, :2].to(dtype), teacher[:, :2].to(dtype))
        torch.testing.assert_close(value, few)
