"""``kd_loss`` on GPUs with a teacher known by its k likeliest classes: one program per row, two passes over it.

With z = sum e^(s/T) over all classes and z_r over those that are not given, the gradient by s_i divided by T is
``(P + r) e_i / z - r e_i / z_r`` for a class that is not given: the second quotient is that class's share of the rest,
which neither cancels nor overflows where the rest's probability is tiny. For that the sum z_r is taken by itself (a
third pass, ``rest="tail"`` only) over a copy of the row, in the memory of its gradient, where the given classes are
-inf. What the given classes' places must have in the end is written over the rest's when the pass is done.

The formulas are those of :mod:`potstill.ops.topk`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from potstill.ops.triton import kd_rows as kd


@triton.jit
def _scan(
    s_row, out_row, s_y, classes, c, COPY: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr, POWER: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """The student's sums; COPY: and a copy of the row."""
    none = kd.each(0.0, SHAPE)
    m, z, z_1, total = kd.each(kd.LOWEST, SHAPE), none, none, none
    centre = kd.centre(s_y)
    BLOCK: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    full = classes // BLOCK * BLOCK
    for MASKED in tl.static_range(2):
        for start in range(MASKED * full, classes if MASKED else full, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = kd.load(s_row, columns, classes, MASKED, "evict_last")
            if COPY:
                kd.store(out_row, columns, classes, s, MASKED)
            if SMOOTH:
                centred = tl.where(columns < classes, s - centre, 0.0) if MASKED else s - centre
                total += kd.fold(tl.reshape(centred, SHAPE))
            m, z, z_1, _, _, _ = kd.absorb(m, z, z_1, none, none, none, s, s, c, "top_k", HARD, POWER, SHAPE)
    m, z, z_1, _, _, _ = kd.merge(m, z, z_1, none, none, none, c, "top_k", HARD)
    return m, z, z_1, tl.sum(total, 0)


@triton.jit
def _scan_rest(out_row, classes, c, SHAPE: tl.constexpr):
    """The sums of the classes that are not given; the second is 0 if there are none."""
    none = kd.each(0.0, SHAPE)
    m, z = kd.each(kd.LOWEST, SHAPE), none
    BLOCK: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    full = classes // BLOCK * BLOCK
    for MASKED in tl.static_range(2):
        for start in range(MASKED * full, classes if MASKED else full, BLOCK):
            s = kd.load(out_row, start + tl.arange(0, BLOCK), classes, MASKED, "evict_last")
            m, z, _, _, _, _ = kd.absorb(m, z, none, none, none, none, s, s, c, "top_k", False, 0, SHAPE)
    m, z, _, _, _, _ = kd.merge(m, z, none, none, none, none, c, "top_k", False)
    return m, z


@triton.jit
def _given(p_row, i_row, places, k, classes):
    """Probabilities and classes; NaN where one is no class, as to raise would have to wait for the device."""
    inside = places < k
    p = tl.exp2(tl.load(p_row + places, mask=inside, other=kd.MINUS_INFINITY).to(tl.float32) * kd.LOG2E)
    i = tl.load(i_row + places, mask=inside, other=0).to(tl.int64)
    valid = (i >= 0) & (i < classes)
    return tl.where(valid, p, kd.nan()), tl.where(valid, i, 0)


@triton.jit
def _keep(s_row, p_row, i_row, kept_row, k, classes, K_BLOCK: tl.constexpr):
    """Returns P; keeps the given classes' logits, and their probabilities: a class given twice has the sum of both."""
    total = 0.0
    for start in range(0, k, K_BLOCK):
        places = start + tl.arange(0, K_BLOCK)
        p, i = _given(p_row, i_row, places, k, classes)
        total += tl.sum(p, 0)
        merged = tl.zeros([K_BLOCK], tl.float32)
        for other in range(0, k, K_BLOCK):
            p_other, i_other = _given(p_row, i_row, other + tl.arange(0, K_BLOCK), k, classes)
            merged += tl.sum(tl.where(i[:, None] == i_other[None, :], p_other[None, :], 0.0), 1)
        tl.store(kept_row + places, tl.load(s_row + i).to(tl.float32), mask=places < k)
        tl.store(kept_row + k + places, merged, mask=places < k)
    return total


@triton.jit
def _exclude(out_row, p_row, i_row, k, classes, K_BLOCK: tl.constexpr):
    """The given classes, those of probability 0 not among them, become -inf."""
    for start in range(0, k, K_BLOCK):
        places = start + tl.arange(0, K_BLOCK)
        p, i = _given(p_row, i_row, places, k, classes)
        nothing = tl.full([K_BLOCK], kd.MINUS_INFINITY, tl.float32).to(out_row.dtype.element_ty)
        tl.store(out_row + i, nothing, mask=(places < k) & (p > 0.0))


@triton.jit
def _value(p_row, i_row, kept_row, k, classes, m, z, cool, norm, DIVERGENCE: tl.constexpr, K_BLOCK: tl.constexpr):
    """sum p_i (ln p_i - ln q_i), or without ln p_i, over the given classes: linear in each probability but for ln p."""
    value = 0.0
    for start in range(0, k, K_BLOCK):
        places = start + tl.arange(0, K_BLOCK)
        p, _ = _given(p_row, i_row, places, k, classes)
        s = tl.load(kept_row + places, mask=places < k, other=0.0)
        p *= norm
        term = tl.log(z) - (s - m) * cool
        if DIVERGENCE == "forward_kl":
            term += tl.log(tl.load(kept_row + k + places, mask=places < k, other=1.0) * norm)
        value += tl.sum(tl.where(p == 0.0, 0.0, p * term), 0)
    return value


@triton.jit
def _write_gradient(
    in_row, out_row, label, classes, m, m_r, c, k_q, k_r, k_1, at_label, everywhere, TAIL: tl.constexpr,
    HARD: tl.constexpr, POWER: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """As if no class were given. k_1 is the cross-entropy's factor; ``at_label`` and ``everywhere`` are added there."""
    BLOCK: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    full = classes // BLOCK * BLOCK
    for MASKED in tl.static_range(2):
        for start in range(MASKED * full, classes if MASKED else full, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = kd.load(in_row, columns, classes, MASKED, "evict_first")
            g = _gradient(s, columns, label, m, m_r, c, k_q, k_r, k_1, at_label, everywhere, TAIL, HARD, POWER)
            kd.store(out_row, columns, classes, g, MASKED)


@triton.jit
def _gradient(
    s, columns, label, m, m_r, c, k_q, k_r, k_1, at_label, everywhere, TAIL: tl.constexpr, HARD: tl.constexpr,
    POWER: tl.constexpr,
):  # fmt: skip
    e = tl.exp2((s - m) * c)
    g = k_q * e
    if TAIL:
        g -= k_r * tl.exp2((s - m_r) * c)
    if HARD:
        g += k_1 * kd.hard_power(e, s - m, POWER) + everywhere + tl.where(columns == label, at_label, 0.0)
    return g


@triton.jit
def _write_given(
    out_row, p_row, i_row, kept_row, label, k, classes, m, c, k_q, k_p, k_1, at_label, everywhere,
    HARD: tl.constexpr, POWER: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    """The given classes' gradients, over what the pass has written there; twice the same if one is given twice."""
    for start in range(0, k, K_BLOCK):
        places = start + tl.arange(0, K_BLOCK)
        p, i = _given(p_row, i_row, places, k, classes)
        s = tl.load(kept_row + places, mask=places < k, other=0.0)
        merged = tl.load(kept_row + k + places, mask=places < k, other=0.0)
        g = _gradient(s, i, label, m, m, c, k_q, 0.0, k_1, at_label, everywhere, False, HARD, POWER) - k_p * merged
        tl.store(out_row + i, g.to(out_row.dtype.element_ty), mask=(places < k) & (p > 0.0))


@triton.jit(do_not_specialize=["s_stride", "o_stride", "p_stride", "i_stride", "classes", "k", "ignore_index"])
def topk_kernel(
    student, out, log_probs, indices, kept, target, row_weight, count, loss, s_stride, o_stride, p_stride, i_stride,
    classes, k, cool, soft_value, soft_grad, hard, smoothing, divisor, ignore_index, DIVERGENCE: tl.constexpr,
    REST: tl.constexpr, GRAD: tl.constexpr, COPY: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr,
    POWER: tl.constexpr, ALIGN: tl.constexpr, SHAPE: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    """``out`` is the gradient, or without one a scratch of its shape if ``rest`` is tail; kept is [rows, 2, k].

    COPY: ``out`` is not the student itself.
    """
    row = tl.program_id(0).to(tl.int64)
    classes = kd.aligned(classes, ALIGN)
    TAIL: tl.constexpr = REST == "tail"
    s_row = kd.row_pointer(student, row, s_stride, ALIGN)
    out_row = s_row
    if GRAD or TAIL:
        out_row = kd.row_pointer(out, row, o_stride, ALIGN)
    p_row, i_row = kd.row_pointer(log_probs, row, p_stride, 1), kd.row_pointer(indices, row, i_stride, 1)
    kept_row = kept + row * 2 * k
    label, scale = kd.label_and_scale(row, target, row_weight, count, divisor, ignore_index, classes)
    if scale == 0.0:
        tl.store(loss + row, 0.0)
        if GRAD:
            kd.fill_zeros(out_row, classes, SHAPE)
        return
    c = cool * kd.LOG2E
    # Now, as the given ones' logits: the copy or the gradient may overwrite it.
    s_y = tl.load(s_row + label, mask=label >= 0, other=0.0).to(tl.float32)
    given = _keep(s_row, p_row, i_row, kept_row, k, classes, K_BLOCK)
    m, z, z_1, total = _scan(s_row, out_row, s_y, classes, c, COPY and TAIL, HARD, SMOOTH, POWER, SHAPE)
    tl.debug_barrier()  # before other threads read what was kept and overwrite what was copied
    norm = 1.0
    if REST == "renormalize":
        norm = 1.0 / given
        given *= norm
    value = _value(p_row, i_row, kept_row, k, classes, m, z, cool, norm, DIVERGENCE, K_BLOCK)
    rest, m_r, z_r = 0.0, 0.0, 0.0
    if TAIL:
        _exclude(out_row, p_row, i_row, k, classes, K_BLOCK)
        tl.debug_barrier()
        m_r, z_r = _scan_rest(out_row, classes, c, SHAPE)
        rest = tl.where(z_r == 0.0, 0.0, tl.maximum(1.0 - given, 0.0))
        log_q = (m_r - m) * cool + tl.log(z_r / z)
        term = tl.log(rest) - log_q if DIVERGENCE == "forward_kl" else -log_q
        value += tl.where(rest == 0.0, 0.0, rest * term)
    value *= soft_value
    if HARD:
        value += hard * kd.cross_entropy(s_y, m, z_1, total, classes, smoothing, SMOOTH)
    tl.store(loss + row, scale * value)
    if GRAD:
        k_p = scale * soft_grad
        k_q = k_p * (given + rest) / z
        k_r = tl.where(rest == 0.0, 0.0, k_p * rest / z_r) if TAIL else 0.0
        k_1, at_label, everywhere = 0.0, 0.0, 0.0
        if HARD:
            k_1 = scale * hard / z_1
            at_label = -scale * hard * (1.0 - smoothing)
            everywhere = -scale * hard * smoothing / classes
        in_row = out_row if TAIL else s_row
        _write_gradient(
            in_row, out_row, label, classes, m, m_r, c, k_q, k_r, k_1, at_label, everywhere, TAIL, HARD, POWER, SHAPE
        )
        tl.debug_barrier()  # before the given ones are written over the others
        _write_given(
            out_row, p_row, i_row, kept_row, label, k, classes, m, c, k_q, k_p * norm, k_1, at_label, everywhere,
            HARD, POWER, K_BLOCK,
        )  # fmt: skip
