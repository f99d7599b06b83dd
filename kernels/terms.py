"""The divergences as Triton functions, one vocabulary entry at a time.

A term takes natural logarithms and probabilities of the teacher (p) and the student (q) and two
constants of the divergence, and returns

    value: its non-negative share of the divergence D = Σ_v value_v,
    slope: q · ∂D/∂q, up to a multiple of q; the gradient wrt the student's logits is
        (slope - q · Σ slope) / T.

Entries outside a distribution's support arrive with probability 0 and a large negative, finite
logarithm.
"""

import triton
import triton.language as tl

from . import limits

LOG2_E = tl.constexpr(limits.LOG2_E)
MAX_EXPONENT = tl.constexpr(limits.MAX_EXPONENT)
MAX_POWER = tl.constexpr(limits.MAX_POWER)


@triton.jit
def kl(p, q, d):
    """p (e^d - 1 - d) with d = log(q/p): the share of KL(p‖q), summed without cancellation."""
    series = 1.0 / 720 + d * (1.0 / 5040 + d * (1.0 / 40320))
    series = 0.5 + d * (1.0 / 6 + d * (1.0 / 24 + d * (1.0 / 120 + d * series)))
    return tl.where(tl.abs(d) < 0.5, p * (d * d * series), q - p - p * d)


@triton.jit
def log_mixture(d, w):
    """log(m/p) and log(m/q) of m = w p + (1 - w) q with d = log(q/p).

    Through the odds x = log((1 - w) q / (w p)): finite when both probabilities underflow, and exact
    where |d| is large.
    """
    x = d + (tl.log(1.0 - w) - tl.log(w))
    tail = tl.log(1.0 + tl.exp(-tl.abs(x)))
    u = tl.maximum(x, 0.0) + tail + tl.log(w)
    v = tl.maximum(-x, 0.0) + tail + tl.log(1.0 - w)
    u = tl.where(w == 0.0, d, tl.where(w == 1.0, 0.0, u))
    v = tl.where(w == 0.0, 0.0, tl.where(w == 1.0, -d, v))
    return u, v


@triton.jit
def power(log_x, exponent):
    """x^exponent; negative exponents overflow, and stop at 2^100."""
    return tl.exp2(tl.minimum(exponent * log_x * LOG2_E, MAX_POWER))


@triton.jit
def forward_kl(log_p, log_q, p, q, a, b):
    return kl(p, q, log_q - log_p), -p


@triton.jit
def reverse_kl(log_p, log_q, p, q, a, b):
    d = log_q - log_p
    return kl(q, p, -d), q * d


@triton.jit
def skew_forward_kl(log_p, log_q, p, q, w, b):
    u, v = log_mixture(log_q - log_p, w)
    return kl(p, w * p + (1.0 - w) * q, u), -(1.0 - w) * p * tl.exp(tl.minimum(-v, MAX_EXPONENT))


@triton.jit
def skew_reverse_kl(log_p, log_q, p, q, w, b):
    u, v = log_mixture(log_q - log_p, w)
    slope = -q * (v + (1.0 - w) * tl.exp(tl.minimum(-v, MAX_EXPONENT)))
    return kl(q, w * p + (1.0 - w) * q, v), slope


@triton.jit
def jsd(log_p, log_q, p, q, w, b):
    u, v = log_mixture(log_q - log_p, w)
    m = w * p + (1.0 - w) * q
    return w * kl(p, m, u) + (1.0 - w) * kl(q, m, v), -(1.0 - w) * q * v


@triton.jit
def jeffreys(log_p, log_q, p, q, f, b):
    d = log_q - log_p
    return f * kl(p, q, d) + (1.0 - f) * kl(q, p, -d), (1.0 - f) * q * d - f * p


@triton.jit
def tvd(log_p, log_q, p, q, a, b):
    d = log_q - log_p
    side = tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, 0.0))
    # kl + p d is q - p without cancellation
    difference = tl.where(tl.abs(d) < 0.5, kl(p, q, d) + p * d, q - p)
    return side * difference, side * q


@triton.jit
def hellinger(log_p, log_q, p, q, a, b):
    root_p, root_q = tl.sqrt(p), tl.sqrt(q)
    return 0.5 * (root_q - root_p) * (root_q - root_p), -0.5 * root_p * root_q


@triton.jit
def alpha_beta(log_p, log_q, p, q, alpha, beta):
    d = log_q - log_p
    s = alpha + beta
    cross = power(alpha * log_p + beta * log_q, 1.0)
    p_s, q_s = power(log_p, s), power(log_q, s)
    # p^s ((β/s) k(s d) - k(β d)) / (αβ) with k(x) = e^x - 1 - x; the linear parts cancel.
    near = p_s * (beta / s * kl(1.0, 1.0, s * d) - kl(1.0, 1.0, beta * d))
    far = alpha / s * p_s + beta / s * q_s - cross
    small = tl.maximum(tl.abs(s * d), tl.abs(beta * d)) < 0.5
    return tl.where(small, near, far) / (alpha * beta), (q_s - cross) / alpha


# Divergences against the mixed logits r = softmax((mix_t z_t + mix_s z_s) / T) take r as well; both
# have the gradient q - r.


@triton.jit
def renyi(log_p, log_q, log_r, p, q, r, order, b):
    """r = p^a q^(1-a) / S, and -log S = a KL(r‖p) + (1 - a) KL(r‖q)."""
    return kl(r, q, log_q - log_r) + order / (1.0 - order) * kl(r, p, log_p - log_r), -r


@triton.jit
def taid(log_p, log_q, log_r, p, q, r, a, b):
    return kl(r, q, log_q - log_r), -r


# Divergences of the logits themselves take d, the student's minus the teacher's, and the share 1/n
# that an entry has in a mean. Their slope is the gradient; both are 0 where d is.


@triton.jit
def logit_mse(d, share):
    return share * d * d, 2.0 * share * d
