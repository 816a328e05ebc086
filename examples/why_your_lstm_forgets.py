# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Why your LSTM forgets
#
# Its forget gates are half open, and too little gradient comes back to open them. Opened too far, they are stuck. This
# page has the numbers of both, and then watches two LSTMs learn: one finds out by itself how to remember, late; the
# other was told.

# %%
import math
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import rnngrad as rg

plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## 1. Half-open gates
#
# With a forget bias $b$ and little else, the memory keeps a share σ(b) per step: it halves every
# $-\ln 2 / \ln σ(b)$ steps. The measured column is the true chain $\partial c_T/\partial c_k$ of an LSTM on random
# inputs, all paths included.

# %%
INPUTS, UNITS, STEPS = 2, 32, 100
xs = jax.random.normal(jax.random.key(1), (STEPS, INPUTS))

print("forget bias   half-life by σ(b)   measured, all paths   retention at lag 100")
for bias in (-1.0, 0.0, 1.0, 2.0, 3.0, 5.0):
    cell = rg.cells.lstm(INPUTS, UNITS, forget_bias=bias)
    curve = rg.retention(cell, cell.init(jax.random.key(0)), cell.init_state(), xs, of="c", wrt="c")
    expected = math.log(2) / math.log1p(math.exp(-bias))
    measured = float(rg.half_life(rg.decay_rate(curve.log_norm, (10, STEPS))))
    shown = "does not fade" if math.isinf(measured) else f"{measured:.2f}"
    print(f"{bias:11.1f}   {expected:17.2f}   {shown:>19}   10^{curve.log_norm[-1] / math.log(10):.1f}")

print(f"\nto keep 10⁻² over {STEPS} steps: forget bias {rg.theory.forget_bias_for(1e-2, STEPS):.2f}")

# %% [markdown]
# Paths through the other gates carry more than the forget gates alone; how much depends on the recurrent weights. At
# half-open gates nothing helps: a hundred steps cost twenty powers of ten.
#
# ## 2. Stuck gates
#
# More is not better. What reaches the weights of a gate is multiplied by σ'(z) = f (1 − f), so that a gate at its rail
# learns next to nothing: with a bias of 8 it remembers, and can no longer be taught to forget.

# %%
for bias in (0.0, 3.0, 8.0):
    cell = rg.cells.lstm(INPUTS, UNITS, forget_bias=bias)
    gates = rg.unroll(cell, cell.init(jax.random.key(0)), cell.init_state(), xs).gates
    f = np.asarray(gates.f)
    print(f"forget bias {bias:.0f}: f averages {f.mean():.4f}, f (1 − f) averages {np.mean(f * (1 - f)):.5f}")

# %% [markdown]
# ## 3. Watch it while it learns
#
# The adding problem: a hundred steps, two of them marked, and at the end the sum of the two marked numbers is wanted.
# Guessing the mean costs 1/6. Below is an ordinary loop, Flax nnx and optax, with two lines added:
# `watch = rg.watch(…)` before it, and `watch(step, net.rnn)` in it. Every 50 updates they measure how much of a
# gradient at the last step comes back to every earlier one, and write it down.

# %%
task = rg.tasks.adding(STEPS)
NUM_UPDATES, EVERY, BATCH = 600, 50, 32


class Net(nnx.Module):
    def __init__(self, forget_bias, rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(INPUTS, UNITS, rngs=rngs), time_major=True)
        self.head = nnx.Linear(UNITS, 1, rngs=rngs)
        b_f, b_i = forget_bias(rngs.params(), UNITS, "float32")
        self.rnn.cell.hf.bias[...] = b_f
        self.rnn.cell.hi.bias[...] = b_i

    def __call__(self, inputs):
        return self.head(self.rnn(inputs)[-1])


@nnx.jit
def update(net, optimizer, batch):
    def loss(net):
        return jnp.mean(jnp.square(net(batch.inputs) - batch.targets[-1]))

    value, grads = nnx.value_and_grad(loss)(net)
    optimizer.update(net, grads)
    return value


draw = jax.jit(task.batch, static_argnums=1)
probe = draw(jax.random.key(99), BATCH).inputs


def train(forget_bias, file):
    net = Net(forget_bias, nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3)), wrt=nnx.Param)
    losses = []
    watch = rg.watch(net.rnn, probe, log=rg.training.jsonl_log(file), every=EVERY)
    for step in range(1, NUM_UPDATES + 1):
        losses.append(update(net, optimizer, draw(jax.random.key(step), BATCH)))
        watch(step, net.rnn)
    watch.close()
    return np.array(losses), rg.training.read_jsonl(file)


def half_open(key, hidden_size, dtype):
    """Flax's default: no forget bias."""
    return jnp.zeros(hidden_size, dtype), jnp.zeros(hidden_size, dtype)


schemes = {"no forget bias": half_open, f"chrono({STEPS})": rg.initializers.chrono(STEPS)}
with tempfile.TemporaryDirectory() as folder:
    runs = {
        name: train(scheme, pathlib.Path(folder) / f"{number}.jsonl")
        for number, (name, scheme) in enumerate(schemes.items())
    }

# %%
HALF, SMOOTH = STEPS // 2, 25


def smooth(losses):
    return np.convolve(losses, np.ones(SMOOTH) / SMOOTH, mode="valid")


for name, (losses, records) in runs.items():
    learnt = np.flatnonzero(smooth(losses) < 0.1 * task.baseline)
    when = f"after {learnt[0] + SMOOTH} updates" if learnt.size else "never"
    print(f"{name}: a tenth of the loss of guessing {when}")
    for record in records[::2]:
        (layer,) = record["layers"]
        loss = losses[max(record["step"] - SMOOTH, 0) : record["step"]].mean()
        reach = layer["log_retention"][HALF] / math.log(10)
        share = 100 * layer["direct_share"]
        at = f"    update {record['step']:3d}: loss {loss:.3f}"
        print(f"{at}, gradient left after {HALF} steps 10^{reach:5.1f}, by the direct path {share:.0f} %")

# %% [markdown]
# The LSTM without a forget bias guesses for as long as its gradient dies on the way: the loss falls with the update at
# which the gradient gets through, and it gets through by the direct path. The other one has it from the first update.
# (One seed each; `python -m experiments.chrono` compares initialisations over several.)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for (name, (losses, _)), colour in zip(runs.items(), ("#d55e00", "#0072b2"), strict=True):
    left.plot(np.arange(SMOOTH, NUM_UPDATES + 1), smooth(losses), color=colour, label=name)
shown = [("no forget bias", step, "#d55e00", 0.3 + step / 600) for step in (1, 300, 350, 400)]
for name, step, colour, alpha in [*shown, (f"chrono({STEPS})", 1, "#0072b2", 1.0)]:
    (record,) = (record for record in runs[name][1] if record["step"] == step)
    curve = np.array(record["layers"][0]["log_retention"]) / math.log(10)
    right.plot(np.arange(STEPS + 1), curve, color=colour, alpha=alpha, label=f"{name}, update {step}")
left.axhline(task.baseline, color="#888888", lw=0.8, ls=":")
left.set(xlabel="update", ylabel=f"loss, mean of {SMOOTH}", title="Adding problem")
right.set(xlabel="lag, steps", ylabel="gradient left, powers of ten", title="What the monitor saw")
for axis in (left, right):
    axis.legend(frameon=False, fontsize=8)
plt.show()
