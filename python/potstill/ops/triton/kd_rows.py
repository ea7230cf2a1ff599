"""What the kernels of the distillation losses share: a row's weight, its online softmax, and elementary functions.

One program computes one row. Logits become float32 as they are loaded; exponentials are powers of 2, with log2(e)
folded into their factor. Largest logits are kept as they were given, and subtracted before anything is multiplied, so
that a large common offset costs no digit.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # where a running maximum starts: finite, as (-inf) - (-inf) would be a NaN
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def nan():
    """A function, as no two NaN constants are the same to the compiler's check of globals."""
    return tl.full([], float("nan"), tl.float32)


@triton.jit
def aligned(size, ALIGN: tl.constexpr):
    """``size`` itself, which ALIGN divides: the compiler may then treat masked vectors as wholes, too."""
    return size // ALIGN * ALIGN


@triton.jit
def each(value, SHAPE: tl.constexpr):
    """One number per thread. A block is SHAPE = [times, threads, vector]: what a thread has loaded, times over.

    A thread has its own sums, and its own largest logit; until the end of a pass it need not wait for another.
    """
    return tl.full([SHAPE[1]], value, tl.float32)


@triton.jit
def fold(x):
    """A block's sums per thread."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def row_pointer(base, row, stride, ALIGN: tl.constexpr):
    """int64: rows times stride passes 2^31. ALIGN, which divides stride, lets 128 bits be loaded at once."""
    return base + row * tl.multiple_of(stride.to(tl.int64), ALIGN)


@triton.jit
def load(row, columns, limit, MASKED: tl.constexpr, EVICT: tl.constexpr = ""):
    """float32; -inf from column ``limit`` on, which is a probability of 0."""
    if MASKED:
        x = tl.load(row + columns, mask=columns < limit, other=MINUS_INFINITY, eviction_policy=EVICT)
    else:
        x = tl.load(row + columns, eviction_policy=EVICT)
    return x.to(tl.float32)


@triton.jit
def store(row, columns, limit, x, MASKED: tl.constexpr):
    """Rounds to the dtype of ``row``."""
    x = x.to(row.dtype.element_ty)
    if MASKED:
        tl.store(row + columns, x, mask=columns < limit)
    else:
        tl.store(row + columns, x)


@triton.jit
def fill_zeros(row, limit, SHAPE: tl.constexpr):
    """The gradient of a row that does not count."""
    BLOCK: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    for start in range(0, limit, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        store(row, columns, limit, tl.zeros([BLOCK], tl.float32), True)


@triton.jit
def label_and_scale(row, target, row_weight, count, divisor, ignore_index, classes):
    """The row's label (-1: none) and what its loss is multiplied by, 0 if it does not count.

    The latter is NaN for a label that is no class: to raise one would have to wait for the device.
    """
    label = tl.full([], -1, tl.int32)
    weight = 1.0
    if target is not None:
        given = tl.load(target + row).to(tl.int64)
        valid = (given >= 0) & (given < classes)
        label = tl.where(valid, given, -1).to(tl.int32)
        weight = tl.where(given == ignore_index, 0.0, tl.where(valid, 1.0, nan()))
    if row_weight is not None:
        factor = tl.load(row_weight + row).to(tl.float32)
        weight = tl.where((weight == 0.0) | (factor == 0.0), 0.0, weight * factor)
    if count is not None:
        n = tl.load(count).to(tl.float32)
        divisor = tl.where(n == 0.0, 1.0, n)  # no row counts: all losses are 0
    return label, weight / divisor


@triton.jit
def hard_power(e, x, POWER: tl.constexpr):
    """e^x, where e = e^(x / T): a product for the temperatures POWER = 1, 2 and 4, as exponentials are the scarcest."""
    if POWER == 0:
        return tl.exp2(x * LOG2E)
    if POWER >= 2:
        e = e * e
    if POWER == 4:
        e = e * e
    return e


@triton.jit
def absorb_hard(m_1, z_1, largest, s):
    """Adds logits, whose largest is given, to the sum z_1 of e^(s - m_1): the new m_1, and both parts of z_1."""
    n_1 = tl.maximum(m_1, largest)
    return n_1, tl.exp2((m_1 - n_1) * LOG2E) * z_1, tl.exp2((s - n_1) * LOG2E)


@triton.jit
def absorb(
    m_s, z_s, z_1, m_t, z_t, a, s, t, c, DIVERGENCE: tl.constexpr, HARD: tl.constexpr, POWER: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """Adds a block to each thread's sums, which are kept relative to the largest logits m_s, m_t that it has seen.

    With x = s - m_s, y = t - m_t and c = log2(e) / T: z_s = sum e^(x/T), z_t = sum e^(y/T), z_1 = sum e^x, and a the
    divergence's own sum: of e^(y/T) (y - x) for forward_kl and dkd, of -e^(y/T) x for soft_ce, of e^(x/T) (x - y) for
    reverse_kl. It is centred: a sum of e^(t/T) (t - s) would cancel when the logits share a large offset.
    """
    s, t = tl.reshape(s, SHAPE), tl.reshape(t, SHAPE)
    n_s = tl.maximum(m_s, tl.max(tl.max(s, 2), 0))
    n_t = m_t
    if DIVERGENCE != "none" and DIVERGENCE != "mse" and DIVERGENCE != "top_k":
        n_t = tl.maximum(m_t, tl.max(tl.max(t, 2), 0))
    z_s, z_1, z_t, a = move(m_s, z_s, z_1, m_t, z_t, a, n_s, n_t, c, DIVERGENCE, HARD)
    x, y = s - n_s[None, :, None], t - n_t[None, :, None]
    e_s = x
    if DIVERGENCE != "none" and DIVERGENCE != "mse":
        e_s = tl.exp2(x * c)
        z_s += fold(e_s)
        if DIVERGENCE != "top_k":
            e_t = tl.exp2(y * c)
            z_t += fold(e_t)
            # Where a first factor is 0 the second may be infinite, and counts for nothing.
            if DIVERGENCE == "forward_kl" or DIVERGENCE == "dkd":
                a += fold(tl.where(e_t > 0.0, e_t * (y - x), 0.0))
            elif DIVERGENCE == "soft_ce":
                a -= fold(tl.where(e_t > 0.0, e_t * x, 0.0))
            elif DIVERGENCE == "reverse_kl":
                a += fold(tl.where(e_s > 0.0, e_s * (x - y), 0.0))
    if HARD:
        z_1 += fold(hard_power(e_s, x, POWER))
    return n_s, z_s, z_1, n_t, z_t, a


@triton.jit
def move(m_s, z_s, z_1, m_t, z_t, a, n_s, n_t, c, DIVERGENCE: tl.constexpr, HARD: tl.constexpr):
    """The sums z_s, z_1, z_t, a relative to larger n_s and n_t.

    Each term's second factor in a moves by m - n, and so a by the sum of the first factors times that.
    """
    moved_s, moved_t = m_s - n_s, m_t - n_t
    scale_s, scale_t = tl.exp2(moved_s * c), tl.exp2(moved_t * c)
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "dkd":
        a = tl.where(scale_t > 0.0, scale_t * (a + z_t * (moved_t - moved_s)), 0.0)
    elif DIVERGENCE == "soft_ce":
        a = tl.where(scale_t > 0.0, scale_t * (a - z_t * moved_s), 0.0)
    elif DIVERGENCE == "reverse_kl":
        a = tl.where(scale_s > 0.0, scale_s * (a + z_s * (moved_s - moved_t)), 0.0)
    z_1 = z_1 * tl.exp2(moved_s * LOG2E) if HARD else z_1
    return z_s * scale_s, z_1, z_t * scale_t, a


@triton.jit
def merge(m_s, z_s, z_1, m_t, z_t, a, c, DIVERGENCE: tl.constexpr, HARD: tl.constexpr):
    """The row's m_s, z_s, z_1, m_t, z_t, a of all threads'."""
    n_s, n_t = tl.max(m_s, 0), tl.max(m_t, 0)
    z_s, z_1, z_t, a = move(m_s, z_s, z_1, m_t, z_t, a, n_s, n_t, c, DIVERGENCE, HARD)
    return n_s, tl.sum(z_s, 0), tl.sum(z_1, 0), n_t, tl.sum(z_t, 0), tl.sum(a, 0)


@triton.jit
def log1p(y, u):
    """ln u for u = 1 + y > 0: y serves near 1, where u has lost its last digits, and u elsewhere.

    u is m 2^k with 2/3 <= m < 4/3, and ln m the polynomial with the least relative error, 5e-8, for m - 1.
    """
    bits = u.to(tl.int32, bitcast=True)
    power = (bits - 0x3F2AAAAB) & -0x800000  # k 2^23; the number is the bits of 2/3
    f = tl.where(power == 0, y, (bits - power).to(tl.float32, bitcast=True) - 1.0)
    series = 0.200073221 + f * (-0.164815794 + f * (0.140542183 + f * (-0.15049429 + f * 0.137565388)))
    series = -0.499999852 + f * (0.333332714 + f * (-0.250042057 + f * series))
    return power.to(tl.float32) * (LN2 / 2**23) + (f + f * f * series)


@triton.jit
def expm1(x, e):
    """e^x - 1 for x <= 0, where e = e^x: near 0, where the difference would cancel, the first 6 terms of its series."""
    series = x * (1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))
    return tl.where(x > -0.25, series, e - 1.0)


@triton.jit
def softplus(x):
    """ln(1 + e^x)."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.maximum(x, 0.0) + log1p(e, 1.0 + e)


@triton.jit
def cross_entropy(s_y, m_1, z_1, total, classes, smoothing, SMOOTH: tl.constexpr):
    """-(1 - eps) ln q_y - eps mean(ln q), where ``total`` is the sum of the logits less :func:`centre` each."""
    log_z = tl.log(z_1)
    value = (m_1 - s_y) + log_z
    if SMOOTH:
        value = (1.0 - smoothing) * value + smoothing * ((m_1 - centre(s_y)) + log_z - total / classes)
    return value


@triton.jit
def centre(s_y):
    """What the sum of all logits is taken relative to, so that a large common offset costs no digit."""
    return tl.where(s_y == MINUS_INFINITY, 0.0, s_y)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def count_kernel(target, count, rows, ignore_index, BLOCK: tl.constexpr):
    """How many rows are not ignored, for a mean: one program, as the host must not wait to know."""
    n = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        places = start + tl.arange(0, BLOCK)
        label = tl.load(target + places, mask=places < rows, other=0).to(tl.int64)
        n += ((places < rows) & (label != ignore_index)).to(tl.int32)
    tl.store(count, tl.sum(n, 0).to(tl.float32))
