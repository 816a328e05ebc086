"""NumPy float64 references, written from the papers' equations and not from the library's code.

For every case name: one step (``ORACLES``), the closed-form step Jacobian J = ∂s'/∂s (``JACOBIANS``) and its direct
part D at frozen pre-activations (``DIRECTS``).  Every entry is called ``f(params, state, x)`` with NamedTuples of NumPy
arrays.  A step takes one sequence or a batch (the hidden axis is last) and returns a dict of the state's fields; the
matrices are for one sequence, over the flattened state: row = output, fields in the order of the NamedTuple, a complex
field as all real parts and then all imaginary parts.

Sources: vanilla: Elman 1990; lstm: Gers, Schmidhuber & Cummins 2000; peephole_lstm: Gers, Schraudolph &
Schmidhuber 2002; coupled_lstm: Greff et al. 2017, variant CIFG; gru_before: Cho et al. 2014, eqs. 5-8 (their z is u);
gru_after: the same with r outside of the recurrent product and a bias within; indrnn: Li et al. 2018, eq. 4; min_gru,
min_lstm: Feng et al. 2024, sections 3.1 and 3.2 (u = 1 − z); lru: Orvieto et al. 2023, section 3.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy.special import expit

_FUNCTIONS = {
    "tanh": np.tanh,
    "sigmoid": expit,
    "relu": lambda z: np.where(z > 0, z, 0.0),
    "identity": lambda z: z,
}


def _logistic_slope(z):
    """σ'(z) = 1/(2 + e^z + e^−z) with e = e^−|z|: shares nothing with σ(1 − σ), and no z overflows."""
    e = np.exp(-np.abs(z))
    return e / (1.0 + e) ** 2


# φ' as a function of z; relu' is 0 at 0, as in every library.
_SLOPES = {
    "tanh": lambda z: 4.0 * _logistic_slope(2.0 * z),  # tanh z = 2σ(2z) − 1
    "sigmoid": _logistic_slope,
    "relu": lambda z: np.where(z > 0, 1.0, 0.0),
    "identity": lambda z: np.ones_like(z),
}


def _blocks(params, state, x, num_gates):
    """Returns W_j x + U_j h + b_j for every gate j, each by its own product: the cells fuse them into one."""
    n = state.h.shape[-1]
    rows = [slice(j * n, (j + 1) * n) for j in range(num_gates)]
    return [x @ params.w_ih[r].T + state.h @ params.w_hh[r].T + params.b[r] for r in rows]


def _recurrent(params, num_gates):
    """Returns U_j for every gate j."""
    return np.split(params.w_hh, num_gates, axis=0)


# --- vanilla: h' = φ(W x + U h + b) ------------------------------------------------------------------------------


def vanilla(params, state, x, *, activation):
    (z,) = _blocks(params, state, x, 1)
    return {"h": _FUNCTIONS[activation](z)}


def vanilla_jacobian(params, state, x, *, activation):
    (z,) = _blocks(params, state, x, 1)
    return np.diag(_SLOPES[activation](z)) @ params.w_hh


def vanilla_direct(params, state, x, *, activation):
    n = state.h.shape[-1]
    return np.zeros((n, n))


# --- LSTMs, state order (h, c) -----------------------------------------------------------------------------------
# One algebra for all three.  With K = ∂c'/∂h, M = ∂c'/∂c (diagonal) and s = ∂h'/∂c' at fixed z_o (diagonal):
#
#     J = [ diag(tanh c' · o') U_o + diag(s) K    diag(s) M ]
#         [ K                                     M         ]
#
# where o' is the slope of the output gate at its pre-activation.


def _lstm_matrix(output_term, s, k, m):
    return np.block([[output_term + np.diag(s) @ k, np.diag(s * m)], [k, np.diag(m)]])


def lstm(params, state, x, *, gate="sigmoid"):
    z_i, z_f, z_g, z_o = _blocks(params, state, x, 4)
    c = _FUNCTIONS[gate](z_f) * state.c + _FUNCTIONS[gate](z_i) * np.tanh(z_g)
    return {"h": _FUNCTIONS[gate](z_o) * np.tanh(c), "c": c}


def _lstm_terms(params, state, x, gate):
    z_i, z_f, z_g, z_o = _blocks(params, state, x, 4)
    u_i, u_f, u_g, u_o = _recurrent(params, 4)
    slope = _SLOPES[gate]
    i, f, g = _FUNCTIONS[gate](z_i), _FUNCTIONS[gate](z_f), np.tanh(z_g)
    c = f * state.c + i * g
    k = np.diag(state.c * slope(z_f)) @ u_f + np.diag(g * slope(z_i)) @ u_i + np.diag(i * _SLOPES["tanh"](z_g)) @ u_g
    s = _FUNCTIONS[gate](z_o) * _SLOPES["tanh"](c)
    return np.diag(np.tanh(c) * slope(z_o)) @ u_o, s, k, f


def lstm_jacobian(params, state, x, *, gate="sigmoid"):
    return _lstm_matrix(*_lstm_terms(params, state, x, gate))


def lstm_direct(params, state, x, *, gate="sigmoid"):
    _, s, k, f = _lstm_terms(params, state, x, gate)
    return _lstm_matrix(np.zeros_like(k), s, np.zeros_like(k), f)


def peephole_lstm(params, state, x):
    z_i, z_f, z_g, z_o = _blocks(params, state, x, 4)
    i = expit(z_i + params.p_i * state.c)
    f = expit(z_f + params.p_f * state.c)
    c = f * state.c + i * np.tanh(z_g)
    return {"h": expit(z_o + params.p_o * c) * np.tanh(c), "c": c}


def _peephole_terms(params, state, x):
    z_i, z_f, z_g, z_o = _blocks(params, state, x, 4)
    u_i, u_f, u_g, u_o = _recurrent(params, 4)
    slope, slope_tanh = _SLOPES["sigmoid"], _SLOPES["tanh"]
    z_i, z_f = z_i + params.p_i * state.c, z_f + params.p_f * state.c
    i, f, g = expit(z_i), expit(z_f), np.tanh(z_g)
    c = f * state.c + i * g
    z_o = z_o + params.p_o * c
    k = np.diag(state.c * slope(z_f)) @ u_f + np.diag(g * slope(z_i)) @ u_i + np.diag(i * slope_tanh(z_g)) @ u_g
    by_peepholes = state.c * slope(z_f) * params.p_f + g * slope(z_i) * params.p_i
    # the new memory reaches h' through tanh c' and, p_o, through the output gate
    s = expit(z_o) * slope_tanh(c) + np.tanh(c) * slope(z_o) * params.p_o
    return np.diag(np.tanh(c) * slope(z_o)) @ u_o, s, k, f, by_peepholes


def peephole_lstm_jacobian(params, state, x):
    output_term, s, k, f, by_peepholes = _peephole_terms(params, state, x)
    return _lstm_matrix(output_term, s, k, f + by_peepholes)


def peephole_lstm_direct(params, state, x):
    """At frozen z_i, z_f the memory moves by f alone; p_o sees c', which is no pre-activation of the old state."""
    _, s, k, f, _ = _peephole_terms(params, state, x)
    return _lstm_matrix(np.zeros_like(k), s, np.zeros_like(k), f)


def coupled_lstm(params, state, x):
    z_f, z_g, z_o = _blocks(params, state, x, 3)
    f = expit(z_f)
    c = f * state.c + (1 - f) * np.tanh(z_g)
    return {"h": expit(z_o) * np.tanh(c), "c": c}


def _coupled_terms(params, state, x):
    z_f, z_g, z_o = _blocks(params, state, x, 3)
    u_f, u_g, u_o = _recurrent(params, 3)
    slope, slope_tanh = _SLOPES["sigmoid"], _SLOPES["tanh"]
    f, g = expit(z_f), np.tanh(z_g)
    c = f * state.c + (1 - f) * g
    k = np.diag((state.c - g) * slope(z_f)) @ u_f + np.diag((1 - f) * slope_tanh(z_g)) @ u_g
    return np.diag(np.tanh(c) * slope(z_o)) @ u_o, expit(z_o) * slope_tanh(c), k, f


def coupled_lstm_jacobian(params, state, x):
    return _lstm_matrix(*_coupled_terms(params, state, x))


def coupled_lstm_direct(params, state, x):
    _, s, k, f = _coupled_terms(params, state, x)
    return _lstm_matrix(np.zeros_like(k), s, np.zeros_like(k), f)


# --- GRU: h' = (1 − u) n + u h, u the share kept -----------------------------------------------------------------


def _gru_parts(params, state, x, reset):
    """Returns the arguments z_r, z_u, z_n of the three non-linearities, and m, what r multiplies."""
    n = state.h.shape[-1]
    w_r, w_u, w_n = np.split(params.w_ih, 3, axis=0)
    u_r, u_u, u_n = np.split(params.w_hh, 3, axis=0)
    b_r, b_u, b_n = params.b[:n], params.b[n : 2 * n], params.b[2 * n :]
    z_r = x @ w_r.T + state.h @ u_r.T + b_r
    z_u = x @ w_u.T + state.h @ u_u.T + b_u
    if reset == "after":
        m = state.h @ u_n.T + params.b_m
        z_n = x @ w_n.T + b_n + expit(z_r) * m
    else:
        m = state.h
        z_n = x @ w_n.T + b_n + (expit(z_r) * m) @ u_n.T
    return z_r, z_u, z_n, m


def gru(params, state, x, *, reset):
    _, z_u, z_n, _ = _gru_parts(params, state, x, reset)
    u = expit(z_u)
    return {"h": (1 - u) * np.tanh(z_n) + u * state.h}


def gru_jacobian(params, state, x, *, reset):
    z_r, z_u, z_n, m = _gru_parts(params, state, x, reset)
    u_r, u_u, u_n = _recurrent(params, 3)
    r, u, n = expit(z_r), expit(z_u), np.tanh(z_n)
    slope, slope_tanh = _SLOPES["sigmoid"], _SLOPES["tanh"]
    if reset == "after":
        dz_n = np.diag(r) @ u_n + np.diag(m * slope(z_r)) @ u_r
    else:
        dz_n = u_n @ (np.diag(r) + np.diag(m * slope(z_r)) @ u_r)
    return np.diag(u) + np.diag((state.h - n) * slope(z_u)) @ u_u + np.diag((1 - u) * slope_tanh(z_n)) @ dz_n


def gru_direct(params, state, x, *, reset):
    _, z_u, _, _ = _gru_parts(params, state, x, reset)
    return np.diag(expit(z_u))


# --- IndRNN: h' = φ(W x + u ⊙ h + b) -----------------------------------------------------------------------------


def indrnn(params, state, x, *, activation):
    return {"h": _FUNCTIONS[activation](x @ params.w_ih.T + params.u * state.h + params.b)}


def indrnn_jacobian(params, state, x, *, activation):
    return np.diag(_SLOPES[activation](x @ params.w_ih.T + params.u * state.h + params.b) * params.u)


# --- minGRU, minLSTM: the gates see the input only ---------------------------------------------------------------


def _kept_min_gru(params, state, x):
    n = state.h.shape[-1]
    return expit(x @ params.w_ih[:n].T + params.b[:n])


def min_gru(params, state, x):
    n = state.h.shape[-1]
    kept = _kept_min_gru(params, state, x)
    return {"h": (1 - kept) * (x @ params.w_ih[n:].T + params.b[n:]) + kept * state.h}


def min_gru_jacobian(params, state, x):
    return np.diag(_kept_min_gru(params, state, x))


def _kept_min_lstm(params, state, x):
    n = state.h.shape[-1]
    i = expit(x @ params.w_ih[:n].T + params.b[:n])
    f = expit(x @ params.w_ih[n : 2 * n].T + params.b[n : 2 * n])
    return f / (f + i)


def min_lstm(params, state, x):
    n = state.h.shape[-1]
    kept = _kept_min_lstm(params, state, x)
    return {"h": kept * state.h + (1 - kept) * (x @ params.w_ih[2 * n :].T + params.b[2 * n :])}


def min_lstm_jacobian(params, state, x):
    return np.diag(_kept_min_lstm(params, state, x))


# --- LRU: h' = λ h + exp(γ) (B x), λ = exp(−exp ν + i exp θ) -----------------------------------------------------


def lru(params, state, x):
    modulus, phase = np.exp(-np.exp(params.nu_log)), np.exp(params.theta_log)
    eigenvalue = modulus * (np.cos(phase) + 1j * np.sin(phase))
    b = params.b_re + 1j * params.b_im
    return {"h": eigenvalue * state.h + np.exp(params.gamma_log) * (x @ b.T)}


def lru_jacobian(params, state, x):
    """A complex factor acts on (Re, Im) as modulus times a rotation."""
    modulus, phase = np.exp(-np.exp(params.nu_log)), np.exp(params.theta_log)
    re, im = np.diag(modulus * np.cos(phase)), np.diag(modulus * np.sin(phase))
    return np.block([[re, -im], [im, re]])


# --- the tables --------------------------------------------------------------------------------------------------

_CASES = {
    **{
        f"vanilla_{name}": (vanilla, vanilla_jacobian, vanilla_direct, {"activation": name})
        for name in ("tanh", "sigmoid", "relu", "identity")
    },
    "lstm": (lstm, lstm_jacobian, lstm_direct, {}),
    "lstm_tanh_gates": (lstm, lstm_jacobian, lstm_direct, {"gate": "tanh"}),
    "peephole_lstm": (peephole_lstm, peephole_lstm_jacobian, peephole_lstm_direct, {}),
    "coupled_lstm": (coupled_lstm, coupled_lstm_jacobian, coupled_lstm_direct, {}),
    "gru_after": (gru, gru_jacobian, gru_direct, {"reset": "after"}),
    "gru_before": (gru, gru_jacobian, gru_direct, {"reset": "before"}),
    # from here on nothing of the state reaches a pre-activation: the direct path is all of J
    "indrnn_relu": (indrnn, indrnn_jacobian, indrnn_jacobian, {"activation": "relu"}),
    "indrnn_tanh": (indrnn, indrnn_jacobian, indrnn_jacobian, {"activation": "tanh"}),
    "min_gru": (min_gru, min_gru_jacobian, min_gru_jacobian, {}),
    "min_lstm": (min_lstm, min_lstm_jacobian, min_lstm_jacobian, {}),
    "lru": (lru, lru_jacobian, lru_jacobian, {}),
}

ORACLES = {name: functools.partial(step, **options) for name, (step, _, _, options) in _CASES.items()}
JACOBIANS = {name: functools.partial(jacobian, **options) for name, (_, jacobian, _, options) in _CASES.items()}
DIRECTS = {name: functools.partial(direct, **options) for name, (_, _, direct, options) in _CASES.items()}
