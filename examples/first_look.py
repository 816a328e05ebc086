# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # First look: how far back does an LSTM's gradient reach?
#
# The popular picture says that the gradient of an LSTM's memory is the product of its forget gates,
# $\partial c_T / \partial c_k \approx \prod_\tau f_\tau$. That product is one term. One step of any gated cell splits
# into the direct path $D$ (the memory that is kept) and the gated path $G$ (what goes through the gates and the
# recurrent weights), and the true derivative is the product of their sums:
#
# $$\frac{\partial s_T}{\partial s_k} = \prod_{\tau=k}^{T-1} (D_\tau + G_\tau), \qquad D_\tau = \mathrm{diag}(f_\tau)
# \ \text{for the memory of an LSTM.}$$
#
# This page measures both on one LSTM, finds out through which gate the rest goes, and shows where plain float32 gives
# up.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import rnngrad as rg

plt.rcParams["figure.dpi"] = 80
INPUTS, UNITS, STEPS = 8, 32, 300

cell = rg.cells.lstm(INPUTS, UNITS, init="keras")  # forget bias 1, Glorot and orthogonal weights
params, state = cell.init(jax.random.key(0)), cell.init_state()
xs = jax.random.normal(jax.random.key(1), (STEPS, INPUTS))

# %% [markdown]
# ## Retention
#
# Retention at a lag is $\|\partial c_T / \partial c_{T-\mathrm{lag}}\|$ divided by its value at lag 0. Every curve is
# kept in log space (`log_norm`, in nats), so that nothing underflows.

# %%
curves = {
    path: rg.retention(cell, params, state, xs, of="c", wrt="c", path=path) for path in ("full", "direct", "remainder")
}
full, direct = curves["full"], curves["direct"]


def decades(nats):
    """Nats as powers of ten."""
    return np.asarray(nats) / np.log(10)


print(" lag   full chain   direct path ∏f   full / direct")
for lag in (1, 10, 30, 100, 300):
    whole, part = decades(full.log_norm[lag]), decades(direct.log_norm[lag])
    print(f"{lag:4d}    10^{whole:7.2f}      10^{part:7.2f}       10^{whole - part:.2f}")

for name, curve in (("full chain", full), ("direct path", direct)):
    rate = rg.decay_rate(curve.log_norm, (20, STEPS))
    print(f"{name}: {rate:.3f} nats per step, halves every {rg.half_life(rate):.2f} steps")

# %% [markdown]
# The product of the forget gates is not the gradient: at the longest lags the rest, which goes through the gates, is
# larger by many powers of ten. Both fade all the same.
#
# ## Through which gate?
#
# `path="only:f"` leaves the path of one gate open beside the direct one; `path="without:f"` cuts that one alone.

# %%
LAG = 100
print(f"retention at lag {LAG}, full chain: 10^{decades(full.log_norm[LAG]):.2f}")
for gate in rg.gate_names(cell, params, state, xs):
    only = rg.retention(cell, params, state, xs, of="c", wrt="c", path=f"only:{gate}")
    without = rg.retention(cell, params, state, xs, of="c", wrt="c", path=f"without:{gate}")
    print(
        f"  {gate}: only it 10^{decades(only.log_norm[LAG]):6.2f}, without it 10^{decades(without.log_norm[LAG]):6.2f}"
    )

# %% [markdown]
# The rest goes through one gate: with g alone the chain is almost whole, and without g next to nothing is left but the
# product of the forget gates.
#
# The same by the number of times a path leaves the direct lane: $\prod (D + \varepsilon G) = \sum_m \varepsilon^m M_m$.
# $M_0$ is $\prod f$, and the shares add up to one. The longer the lag, the more often a typical path goes through g.

# %%
parts = rg.gradient_paths(cell, params, state, xs[:60], max_crossings=12, of="c", wrt="c")
for lag in (5, 20, 60):
    share = np.asarray(parts.share[lag])
    most = share[:-1].argmax()
    print(
        f"lag {lag}: direct path {100 * share[0]:.3f} %, most crosses {most} times; shares add up to {share.sum():.4f}"
    )

# %% [markdown]
# ## How far to trust it
#
# A plain float32 product dies long before lag 300; the curve says where. The certificate records what it was computed
# with, and the same chain in float64 is the check.

# %%
naive = rg.naive_retention(cell, params, state, xs, of="c", wrt="c")
print(f"plain float32 gives −inf from lag {int(full.naive_death_lag)} on")
print(full.certificate)
with jax.enable_x64(True):
    wide = rg.cells.lstm(INPUTS, UNITS, init="keras", dtype="float64")
    as_wide = jax.tree.map(lambda leaf: leaf.astype("float64"), (params, state, xs))
    exact = rg.retention(wide, *as_wide, of="c", wrt="c")
    error = np.abs(np.asarray(full.log_norm) - np.asarray(exact.log_norm)).max()
print(f"largest difference between float32 and float64, lags 0 to {STEPS}: {error:.1e} nats")

# %%
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for name, colour, width in (("full", "#c8c8c8", 6), ("direct", "#d55e00", 1.5), ("remainder", "#009e73", 1.5)):
    label = {"full": "full chain", "direct": "direct path ∏f", "remainder": "full − direct"}[name]
    axis.plot(full.lags, decades(curves[name].log_norm), color=colour, lw=width, label=label)
alive = np.isfinite(naive)
axis.plot(full.lags[alive], decades(naive[alive]), color="#cc0000", ls="--", label="full chain in plain float32")
axis.set(xlabel="lag, steps", ylabel="retention, powers of ten", title="Memory gradient of an LSTM, Keras's defaults")
axis.legend(frameon=False)
plt.show()
