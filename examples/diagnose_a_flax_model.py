# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Diagnose a Flax model
#
# An `nnx.RNN` of an `nnx.LSTMCell` with Flax's own initialisation is to use what it saw 200 steps ago. Can its gradient
# get there? `rg.diagnose` takes the module as it is and a batch of its inputs; nothing has to be rewritten or trained.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import rnngrad as rg

# %matplotlib inline
plt.rcParams["figure.dpi"] = 80
INPUTS, UNITS, STEPS, BATCH = 6, 48, 200, 4

rnn = nnx.RNN(nnx.LSTMCell(INPUTS, UNITS, rngs=nnx.Rngs(0)))
xs = jax.random.normal(jax.random.key(1), (BATCH, STEPS, INPUTS))  # (B, T, D), as nnx.RNN takes it

report = rg.diagnose(rnn, None, xs, time_axis=1)


def show(report):
    print(f"warnings: {len(report.warnings)}")
    for finding in report.findings:
        print(f"{finding.severity} ({finding.code}): {finding.text}")
        if finding.remedy:
            print(f"    remedy: {finding.remedy}")


show(report)

# %% [markdown]
# ## Reading it
#
# A warning names what is wrong, what it rests on (`finding.evidence`) and what would change it. The numbers behind it:

# %%
(layer,) = report.layers
print(f"memory {layer.memory!r} of {report.source}, {report.num_sequences} sequences, {report.num_steps} steps")
print(f"half-life {layer.half_life:.2f} steps; 10⁻² is left at lag {layer.horizon:.1f}")
print(f"direct path ∏f alone: half-life {layer.direct_half_life:.2f}, 10⁻² at lag {layer.direct_horizon:.1f}")
for gate, rails in layer.saturation.items():
    print(f"gate {gate}: mean {rails.mean:.3f}, share of the loss's gradient {100 * layer.gate_share[gate]:.1f} %")

# %% [markdown]
# In a notebook the report shows itself: findings, figure, tables. `report.to_html()` is the same as a page of its own,
# `report.to_json()` is for programs, `report.table()` for the terminal.

# %%
report

# %% [markdown]
# ## The remedy
#
# Flax draws no forget bias: every forget gate starts near σ(0) = 1/2, and the memory halves at every step. Chrono
# initialisation (Tallec & Ollivier 2018) draws forget biases from log U(1, T − 1), so that the units' memories are
# spread over all lengths up to T, and sets the input gates' to the opposite.

# %%
b_f, b_i = rg.initializers.chrono(STEPS)(jax.random.key(2), UNITS, "float32")
rnn.cell.hf.bias[...] = b_f
rnn.cell.hi.bias[...] = b_i

after = rg.diagnose(rnn, None, xs, time_axis=1)
show(after)
print(" lag    before     after")
for lag in (1, 10, 50, 100, 200):
    before_at, after_at = (np.median(found.layers[0].curves.full[:, lag]) / np.log(10) for found in (report, after))
    print(f"{lag:4d}   10^{before_at:6.1f}   10^{after_at:6.1f}")

# %% [markdown]
# A tenth of the gradient arrives after 200 steps, where it was 10⁻³⁹ before. Whether the model then learns is up to the
# task and the training; that it could not learn before was decided by the initialisation.

# %%
after.plot()
