"""``kd_loss`` on GPUs: one program per row, in two passes over it, or three for jsd and tv.

1. the row's sums (:func:`potstill.ops.triton.kd_rows.absorb`), from which the loss of most divergences follows;
2. jsd and tv only: sums of terms that need both distributions;
3. the gradient. It may overwrite the student's logits: each is read by the thread that overwrites it.

The formulas are those of :mod:`potstill.ops.divergence`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from potstill.ops.triton import kd_rows as kd


@triton.jit
def _load_pair(
    s_row, t_row, columns, common, label, DIVERGENCE: tl.constexpr, MASKED: tl.constexpr, EVICT: tl.constexpr
):
    """Student's and teacher's logits of a block, and the student's without dkd's label, which is in no softmax."""
    raw = kd.load(s_row, columns, common, MASKED, EVICT)
    s, t = raw, raw
    if DIVERGENCE != "none":
        t = kd.load(t_row, columns, common, MASKED, EVICT)
    if DIVERGENCE == "dkd":
        s = tl.where(columns == label, kd.MINUS_INFINITY, s)
        t = tl.where(columns == label, kd.MINUS_INFINITY, t)
    return raw, s, t


@triton.jit
def _scan(
    s_row, t_row, label, s_y, classes, common, c,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr, EXTRA: tl.constexpr, POWER: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """The row's sums, and the sum of its logits less their centre. EXTRA: there are classes the teacher lacks.

    A row of nothing but -inf has sums of 0, from whose quotients and logarithms NaN follow.
    """
    lowest, zero = kd.each(kd.LOWEST, SHAPE), kd.each(0.0, SHAPE)
    m_s, z_s, z_1, m_t, z_t, a, total = lowest, zero, zero, lowest, zero, zero, zero
    centre = kd.centre(s_y)
    BLOCK: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    full = common // BLOCK * BLOCK
    for MASKED in tl.static_range(2):
        for start in range(MASKED * full, common if MASKED else full, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            raw, s, t = _load_pair(s_row, t_row, columns, common, label, DIVERGENCE, MASKED, "evict_last")
            if SMOOTH:
                centred = tl.where(columns < common, raw - centre, 0.0) if MASKED else raw - centre
                total += kd.fold(tl.reshape(centred, SHAPE))
            if DIVERGENCE == "mse":
                d = _difference(s, t)
                a += kd.fold(tl.reshape(d * d, SHAPE))
            if DIVERGENCE != "mse" or HARD:
                m_s, z_s, z_1, m_t, z_t, a = kd.absorb(
                    m_s, z_s, z_1, m_t, z_t, a, s, t, c, DIVERGENCE, HARD, POWER, SHAPE
                )
    m_s, z_s, z_1, m_t, z_t, a = kd.merge(m_s, z_s, z_1, m_t, z_t, a, c, DIVERGENCE, HARD)
    total = tl.sum(total, 0)
    m_1 = m_s
    if HARD and DIVERGENCE == "dkd":
        own = tl.where((label >= 0) & (label < common), s_y, kd.MINUS_INFINITY)
        m_1, z_1, e_1 = kd.absorb_hard(m_1, z_1, own, own)
        z_1 += e_1
    if HARD and EXTRA:
        for start in range(common, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = kd.load(s_row, columns, classes, True, "evict_last")
            m_1, z_1, more = kd.absorb_hard(m_1, z_1, tl.max(s, 0), s)
            z_1 += tl.sum(more, 0)
            if SMOOTH:
                total += tl.sum(tl.where(columns < classes, s - centre, 0.0), 0)
    return m_s, z_s, m_t, z_t, a, m_1, z_1, total


@triton.jit
def _difference(s, t):
    """s - t, 0 where both are -inf (which fills up blocks, too)."""
    return tl.where((s == kd.MINUS_INFINITY) & (t == kd.MINUS_INFINITY), 0.0, s - t)


@triton.jit
def _probabilities(s, t, m_s, z_s, m_t, z_t, c, cool):
    """q, p, and ln p - ln q, which is a NaN where both are 0."""
    x, y = s - m_s, t - m_t
    return tl.exp2(x * c) * (1.0 / z_s), tl.exp2(y * c) * (1.0 / z_t), (y - x) * cool + tl.log(z_s / z_t)


@triton.jit
def _from_mixture(d, beta, rest):
    """ln q - ln m and ln p - ln m for the mixture m = beta p + rest q, where d = ln p - ln q and rest = 1 - beta.

    For d <= 0 the first is -ln(rest + beta e^d) = -ln(1 + beta (e^d - 1)), and the second is d more; for d > 0 it is
    the other way around. Without ln m itself all digits are kept where p and q are close, and none is infinite.
    """
    x = -tl.abs(d)
    e = tl.exp2(x * kd.LOG2E)
    share = tl.where(d <= 0.0, beta, rest)
    other = tl.where(d <= 0.0, rest, beta)
    larger = -kd.log1p(share * kd.expm1(x, e), other + share * e)
    return tl.where(d <= 0.0, larger, larger + x), tl.where(d <= 0.0, larger + x, larger)


@triton.jit
def _pull(q, p, d, beta, rest, DIVERGENCE: tl.constexpr):
    """Where q is not 0: the terms g_i of a gradient of the form q_i (g_i - sum q g), for jsd and tv."""
    if DIVERGENCE == "tv":
        equal = tl.where(q == p, 0.0, kd.nan())
        return tl.where(q > p, 0.5, tl.where(q < p, -0.5, equal)), d
    to_q, to_p = _from_mixture(d, beta, rest)
    return rest * tl.where(q == 0.0, 0.0, to_q), to_p


@triton.jit
def _compare(
    s_row, t_row, common, m_s, z_s, m_t, z_t, c, cool, beta, rest, DIVERGENCE: tl.constexpr, SHAPE: tl.constexpr
):
    """The value of jsd or tv, and the sum q g of its gradient."""
    value, base = kd.each(0.0, SHAPE), kd.each(0.0, SHAPE)
    BLOCK: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    full = common // BLOCK * BLOCK
    for MASKED in tl.static_range(2):
        for start in range(MASKED * full, common if MASKED else full, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = kd.load(s_row, columns, common, MASKED, "evict_last")
            t = kd.load(t_row, columns, common, MASKED, "evict_last")
            q, p, d = _probabilities(s, t, m_s, z_s, m_t, z_t, c, cool)
            pull, to_p = _pull(q, p, d, beta, rest, DIVERGENCE)
            base += kd.fold(tl.reshape(q * pull, SHAPE))
            if DIVERGENCE == "tv":
                value += 0.5 * kd.fold(tl.reshape(tl.abs(q - p), SHAPE))
            else:
                value += beta * kd.fold(tl.reshape(p * tl.where(p == 0.0, 0.0, to_p), SHAPE))
    value, base = tl.sum(value, 0), tl.sum(base, 0)
    return value if DIVERGENCE == "tv" else value + base, base


@triton.jit
def _decoupled(s_y, t_y, m_s, z_s, m_t, z_t, present, cool):
    """dkd's part at the label: its divergence, and p_y - q_y; both 0 if the label is not among the common classes."""
    odds_q = (s_y - m_s) * cool - tl.log(z_s)  # ln q_y - ln(1 - q_y)
    odds_p = (t_y - m_t) * cool - tl.log(z_t)
    log_q, log_p = -kd.softplus(-odds_q), -kd.softplus(-odds_p)
    others_q, others_p = -kd.softplus(odds_q), -kd.softplus(odds_p)  # without the cancellation of 1 - q_y
    p, p_others = tl.exp2(log_p * kd.LOG2E), tl.exp2(others_p * kd.LOG2E)
    value = tl.where(log_p == kd.MINUS_INFINITY, 0.0, p * (log_p - log_q))
    value += tl.where(others_p == kd.MINUS_INFINITY, 0.0, p_others * (others_p - others_q))
    # From the smaller pair: near 1 both would have lost their last digits.
    pull = tl.where(log_p > -1.0, tl.exp2(others_q * kd.LOG2E) - p_others, p - tl.exp2(log_q * kd.LOG2E))
    return tl.where(present, value, 0.0), tl.where(present, pull, 0.0)


@triton.jit
def _divergence(a, z_s, z_t, cool, DIVERGENCE: tl.constexpr):
    """By the row's sums, for those that need no second pass; for dkd its part without the label."""
    if DIVERGENCE == "soft_ce":
        return a / z_t * cool + tl.log(z_s)
    if DIVERGENCE == "reverse_kl":
        return a / z_s * cool + tl.log(z_t / z_s)
    return a / z_t * cool + tl.log(z_s / z_t)


@triton.jit
def _soft_gradient(s, t, m_s, z_s, m_t, z_t, c, cool, beta, rest, base, k_s, k_t, DIVERGENCE: tl.constexpr):
    """A block's gradient of the divergence, and e^((s - m_s) / T)."""
    if DIVERGENCE == "none" or DIVERGENCE == "mse":
        return k_s * _difference(s, t), s
    x, y = s - m_s, t - m_t
    e_s = tl.exp2(x * c)
    if DIVERGENCE == "reverse_kl":
        d = tl.where(e_s == 0.0, 0.0, (x - y) * cool + tl.log(z_t / z_s))
        return k_s * e_s * (d - base), e_s
    if DIVERGENCE == "jsd" or DIVERGENCE == "tv":
        q, p, d = _probabilities(s, t, m_s, z_s, m_t, z_t, c, cool)
        pull, _ = _pull(q, p, d, beta, rest, DIVERGENCE)
        return k_s * e_s * (pull - base), e_s
    return k_s * e_s - k_t * tl.exp2(y * c), e_s


@triton.jit
def _write_gradient(
    s_row, t_row, g_row, label, classes, common, m_s, z_s, m_t, z_t, m_1, c, cool, beta, rest, base, k_s, k_t, k_1,
    at_label, everywhere, DIVERGENCE: tl.constexpr, HARD: tl.constexpr, EXTRA: tl.constexpr, POWER: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """The last pass. k_1 is the cross-entropy's factor; ``at_label`` and ``everywhere`` are added there."""
    BLOCK: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    full = common // BLOCK * BLOCK
    for MASKED in tl.static_range(2):
        for start in range(MASKED * full, common if MASKED else full, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            raw, s, t = _load_pair(s_row, t_row, columns, common, label, DIVERGENCE, MASKED, "evict_first")
            g, e_s = _soft_gradient(s, t, m_s, z_s, m_t, z_t, c, cool, beta, rest, base, k_s, k_t, DIVERGENCE)
            if HARD:
                g += k_1 * kd.hard_power(e_s, raw - m_1, POWER) + everywhere
            if HARD or DIVERGENCE == "dkd":
                g += tl.where(columns == label, at_label, 0.0)
            kd.store(g_row, columns, common, g, MASKED)
    if EXTRA:
        for start in range(common, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            g = tl.zeros([BLOCK], tl.float32)
            if HARD:
                s = kd.load(s_row, columns, classes, True, "evict_first")
                g = k_1 * tl.exp2((s - m_1) * kd.LOG2E) + everywhere + tl.where(columns == label, at_label, 0.0)
            kd.store(g_row, columns, classes, g, True)


@triton.jit(do_not_specialize=["s_stride", "t_stride", "g_stride", "classes", "common", "ignore_index"])
def kd_loss_kernel(
    student, teacher, target, row_weight, count, loss, grad, s_stride, t_stride, g_stride, classes, common,
    cool, soft_value, soft_grad, hard, beta, rest, smoothing, divisor, ignore_index,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr, EXTRA: tl.constexpr, POWER: tl.constexpr,
    ALIGN: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """``cool`` is 1 / T; soft_value, soft_grad and hard are alpha T^2, alpha T (mse: alpha) and 1 - alpha."""
    row = tl.program_id(0).to(tl.int64)
    classes, common = kd.aligned(classes, ALIGN), kd.aligned(common, ALIGN)
    s_row = kd.row_pointer(student, row, s_stride, ALIGN)
    t_row = kd.row_pointer(teacher, row, t_stride, ALIGN)
    label, scale = kd.label_and_scale(row, target, row_weight, count, divisor, ignore_index, classes)
    if scale == 0.0:
        tl.store(loss + row, 0.0)
        if grad is not None:
            kd.fill_zeros(kd.row_pointer(grad, row, g_stride, ALIGN), classes, SHAPE)
        return
    c = cool * kd.LOG2E
    shared = (label >= 0) & (label < common)
    # Now: the gradient may overwrite it.
    s_y = tl.load(s_row + label, mask=label >= 0, other=0.0).to(tl.float32)
    m_s, z_s, m_t, z_t, a, m_1, z_1, total = _scan(
        s_row, t_row, label, s_y, classes, common, c, DIVERGENCE, HARD, SMOOTH, EXTRA, POWER, SHAPE
    )
    value, base, at_label, k_s, k_t = 0.0, 0.0, 0.0, 0.0, 0.0
    if DIVERGENCE == "mse":
        value = a / common
        k_s = scale * soft_grad * 2.0 / common
    elif DIVERGENCE != "none":
        k_s, k_t = scale * soft_grad / z_s, scale * soft_grad / z_t
        if DIVERGENCE == "jsd" or DIVERGENCE == "tv":
            value, base = _compare(s_row, t_row, common, m_s, z_s, m_t, z_t, c, cool, beta, rest, DIVERGENCE, SHAPE)
        else:
            value = _divergence(a, z_s, z_t, cool, DIVERGENCE)
            base = value  # of reverse_kl
        if DIVERGENCE == "dkd":
            t_y = tl.load(t_row + label, mask=shared, other=0.0).to(tl.float32)
            part, pull = _decoupled(s_y, t_y, m_s, z_s, m_t, z_t, shared, cool)
            value = part + beta * value
            at_label = -scale * soft_grad * pull
            k_s, k_t = k_s * (pull + beta), k_t * beta
    value *= soft_value
    k_1, everywhere = 0.0, 0.0
    if HARD:
        value += hard * kd.cross_entropy(s_y, m_1, z_1, total, classes, smoothing, SMOOTH)
        k_1 = scale * hard / z_1
        at_label -= scale * hard * (1.0 - smoothing)
        everywhere = -scale * hard * smoothing / classes
    tl.store(loss + row, scale * value)
    if grad is not None:
        g_row = kd.row_pointer(grad, row, g_stride, ALIGN)
        _write_gradient(
            s_row, t_row, g_row, label, classes, common, m_s, z_s, m_t, z_t, m_1, c, cool, beta, rest, base, k_s, k_t,
            k_1, at_label, everywhere, DIVERGENCE, HARD, EXTRA, POWER, SHAPE
        )  # fmt: skip
