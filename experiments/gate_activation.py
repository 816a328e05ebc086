"""Do the gates of an LSTM want the sigmoid rather than tanh?

The cell is the same but for what i, f and o pass through.  tanh is tried twice: with the biases of the sigmoid (the
swap that a reader would make), and with biases that give its gates the sigmoid's value at zero input, bias atanh σ(b)
in place of b (otherwise one compares a gate of 1/2 with one of 0).  Two things are measured: retention of the memory's
gradient in fresh networks, and learning of the adding problem.  So that training is a fair chance for all, it is done
at two learning rates, 1e-2 (at which the sigmoid learns the task) and one three times smaller, and each row is judged
by its better one.  Running time: about 4 minutes on two cores with the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.lines
import numpy as np
import optax
import rich.console
import rich.table
import scipy.special
import xarray as xr

import rnngrad as rg
from experiments import command, results
from experiments.claims import Check, Claim
from experiments.command import Piece, UserError
from experiments.statistics import Interval, describe, interval_text, median_interval, summarise
from experiments.trials import Trainer, first_reached

CLAIMS = (
    Claim(
        "D5",
        "The gates of an LSTM want the sigmoid and not tanh: a gate is a share between 0 and 1, and tanh would make it "
        "negative.",
        source="introductions to the LSTM, without a measurement; the gates of Hochreiter & Schmidhuber 1997 are "
        "logistic",
        prediction="no number was known; with the same biases tanh gates start at 0 and keep nothing, with matched "
        "ones their slope is (1 + v)/v times that of a sigmoid of value v, 2 to 3 times, so that the gates move more "
        "and retention falls; the adding problem takes more updates or is not learned",
        refuted="tanh gates keep as much of the gradient, or learn the adding problem in as few updates",
        functions=("rg.cells.lstm", "rg.retention", "rg.tasks.adding"),
        tests=("tests/test_gate_activation.py", "tests/test_contract.py"),
    ),
)

KINDS = ("sigmoid", "tanh, same bias", "tanh, same value")
"""The gates of a row: what they pass through, and how their biases were chosen."""
PATHS = ("full", "direct")
SOLVED = 0.1
"""Share of the loss of predicting the mean below which the task counts as learned."""
WHY_RETENTION = "the claim is a comparison: paired by seed, the sigmoid's retention is the larger one"
WHY_LEARNING = "the claim is a comparison: paired by seed, the sigmoid needs fewer updates; unsolved counts as all"
WHY_NEGATIVE = "σ > 0 and a tanh gate with bias atanh σ(b) is negative only where its input is below −bias"
GRAD_CLIP = 1.0
"""Global norm at which gradients are clipped; the same for all rows."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison of gate activations."""

    forget_biases: tuple[float, ...] = (0.0, 1.0, 3.0)
    """Biases b of the sigmoid's forget gate, rising; the input and the output gate have 0."""
    steps: int = 100
    """Lags over which retention of fresh networks is measured."""
    hidden_size: int = 32
    """Units N; weights are drawn as in Torch."""
    input_size: int = 32
    """Width D of the input of fresh networks, entries N(0, 1)."""
    seeds: int = 10
    """Fresh networks; each draws weights and inputs, the same for every row."""
    task_steps: int = 50
    """Length T of the adding problem."""
    updates: int = 2_000
    """Updates at the most; a trial ends when it has learned."""
    eval_every: int = 100
    """Updates between evaluations on held-out sequences."""
    batch_size: int = 20
    """Sequences of an update."""
    learning_rates: tuple[float, ...] = (1e-2, 3e-3)
    """Rates of Adam; each row is judged by its better one."""
    train_seeds: int = 5
    """Trained networks of each row and rate."""
    test_size: int = 500
    """Held-out sequences."""
    first_seed: int = 0
    """Seeds run from here."""


SMOKE = Config(
    forget_biases=(1.0,), steps=20, hidden_size=4, input_size=4, seeds=2, task_steps=6, updates=4, eval_every=2,
    batch_size=4, learning_rates=(1e-2,), train_seeds=2, test_size=8,
)  # fmt: skip
"""A few seconds: every code path, no statement about the claim."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {"steps": 3, "hidden_size": 1, "input_size": 1, "seeds": 1, "task_steps": 2, "updates": 1, "eval_every": 1}
    command.check_at_least(config, least | {"batch_size": 1, "train_seeds": 1, "test_size": 1, "first_seed": 0})
    biases, rates = config.forget_biases, config.learning_rates
    if not biases or list(biases) != sorted(set(biases)) or not np.isfinite(biases).all():
        raise UserError(f"--forget-biases: expected finite numbers, rising, found {biases}")
    if not rates or len(set(rates)) < len(rates) or not all(np.isfinite(rate) and rate > 0 for rate in rates):
        raise UserError(f"--learning-rates: expected different positive numbers, found {rates}")
    if config.updates % config.eval_every:
        raise UserError(f"--updates: expected a multiple of --eval-every {config.eval_every}, found {config.updates}")


class _Gates(NamedTuple):
    activation: str
    forget: float
    """Bias of the forget gate."""
    others: float
    """Bias of the input and the output gate."""


def gates_of(kind: str, bias: float) -> _Gates:
    """Returns activation and biases of a row."""
    if kind == "sigmoid":
        return _Gates("sigmoid", bias, 0.0)
    if kind == "tanh, same bias":
        return _Gates("tanh", bias, 0.0)
    return _Gates("tanh", float(np.arctanh(scipy.special.expit(bias))), float(np.arctanh(0.5)))


@functools.cache
def _cell(activation: str, input_size: int, hidden_size: int) -> rg.Cell:
    return rg.cells.lstm(input_size, hidden_size, gate_activation=activation)


def _with_biases(params: Any, gates: _Gates) -> Any:
    """Sets the biases of i, f and o; those of the candidate g stay as drawn."""
    i, f, g, o = jnp.split(params.b, 4)
    b = jnp.concatenate(
        [jnp.full_like(i, gates.others), jnp.full_like(f, gates.forget), g, jnp.full_like(o, gates.others)]
    )
    return params._replace(b=b)


@functools.partial(jax.jit, static_argnames="cell")
def _measure(cell, params, xs):
    """Retention of one fresh network, and its forget gates."""
    state = cell.init_state()
    curve = rg.retention(cell, params, state, xs, of="c", wrt="c")
    return curve.log_norm, rg.unroll(cell, params, state, xs).gates.f, curve.nonfinite_step


def direct_retention(f: np.ndarray) -> np.ndarray:
    """Returns log ‖∏ diag f‖_F for every lag, 0 at lag 0: the direct path of c, of which nothing but f is needed."""
    with np.errstate(divide="ignore"):
        products = np.cumsum(np.log(np.abs(f[::-1].astype(float))), axis=0)
    products = np.concatenate([np.zeros((1, f.shape[1])), products])
    return 0.5 * (scipy.special.logsumexp(2 * products, axis=1) - np.log(f.shape[1]))


def _measure_row(kind: str, bias: float, config: Config) -> xr.Dataset:
    """Returns the fresh networks of one row: every seed."""
    gates = gates_of(kind, bias)
    cell = _cell(gates.activation, config.input_size, config.hidden_size)
    seeds = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        key_params, key_xs = jax.random.split(jax.random.key(seed))
        xs = jax.random.normal(key_xs, (config.steps, config.input_size))
        params = _with_biases(cell.init(key_params), gates)
        full, f, nonfinite_step = jax.device_get(_measure(cell, params, xs))
        seeds.append(
            {
                "log_retention": np.stack([full, direct_retention(f)]).astype(np.float32),
                "mean_f": np.mean(f),
                "negative_f": np.mean(f < 0, dtype=np.float32),
                "nonfinite_step": nonfinite_step,
            }
        )
    dims = {"log_retention": ("path", "lag"), "mean_f": (), "negative_f": (), "nonfinite_step": ()}
    return xr.Dataset({name: (("seed", *dims[name]), np.stack([s[name] for s in seeds])) for name in dims})


@functools.cache
def _task(config: Config) -> rg.tasks.Task:
    return rg.tasks.adding(config.task_steps)


@functools.cache
def _trainer(activation: str, rate: float, config: Config) -> tuple[rg.training.Model, Trainer]:
    """Compiled once for all biases and seeds, which differ in the weights they start from."""
    task = _task(config)
    model = rg.training.model([_cell(activation, task.input_size, config.hidden_size)], task.output_size)

    def loss(output, batch):
        return rg.losses.mse(output.outputs, batch.targets, batch.mask)

    def measure(params, key):
        batch = task.batch(key, config.test_size)
        output = model.apply(params, model.init_state((config.test_size,)), batch.inputs)
        f = output.trajectories[0].gates.f
        return {"loss": loss(output, batch), "trained_negative_f": jnp.mean((f < 0).astype(f.dtype))}

    def batch_at(key, step):
        return task.batch(jax.random.fold_in(key, step), config.batch_size)

    optimizer = optax.chain(rg.remedies.clip_by_global_norm(GRAD_CLIP), optax.adam(rate))
    return model, Trainer(model, loss, optimizer, batch_at, measure, batch_size=config.batch_size)


def _train_row(kind: str, bias: float, rate: float, config: Config) -> xr.Dataset:
    """Returns the trained networks of one row at one learning rate: every seed."""
    gates = gates_of(kind, bias)
    model, trainer = _trainer(gates.activation, rate, config)
    threshold = SOLVED * _task(config).baseline
    seeds = []
    for seed in range(config.first_seed, config.first_seed + config.train_seeds):
        key_params, key_run = jax.random.split(jax.random.key(seed))
        params = model.init(key_params)
        trial = trainer.run(
            key_run,
            updates=config.updates,
            eval_every=config.eval_every,
            params=params._replace(layers=(_with_biases(params.layers[0], gates),)),
            until=lambda measured: bool(measured["loss"] < threshold),
        )
        loss, negative = (trial.measured[name].astype(np.float32) for name in ("loss", "trained_negative_f"))
        last = int(np.flatnonzero(~np.isnan(loss))[-1])
        seeds.append(
            {
                "test_loss": loss,
                "updates_to_solve": first_reached(trial.updates, loss < threshold),
                "trained_negative_f": negative[last],
                "failed_at": trial.failed_at,
            }
        )
    dims = {"test_loss": ("evaluation",), "updates_to_solve": (), "trained_negative_f": (), "failed_at": ()}
    return xr.Dataset({name: (("trial", *dims[name]), np.stack([s[name] for s in seeds])) for name in dims})


MEASURED = (
    "log_retention", "mean_f", "negative_f", "nonfinite_step", "test_loss", "updates_to_solve",
    "trained_negative_f", "failed_at",
)  # fmt: skip
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "log_retention": ("nats", "log of ‖∂c_T/∂c_{T−lag}‖_F of fresh networks, 0 at lag 0"),
    "mean_f": ("1", "mean value of the forget gate in fresh networks"),
    "negative_f": ("1", "share of its values below 0 in fresh networks"),
    "nonfinite_step": ("steps", "first time step with a non-finite state or chain; −1 for none"),
    "test_loss": ("1", "squared error of the adding problem on held-out sequences; NaN after the end of a trial"),
    "updates_to_solve": ("updates", "the first evaluation at which the loss is below a tenth of 1/6; NaN if never"),
    "trained_negative_f": ("1", "share of the forget gate's values below 0 at the last evaluation"),
    "failed_at": ("updates", "update whose loss, gradient or weights were not finite; −1 for none"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with medians and intervals over seeds."""
    summarise(dataset, ("log_retention", "mean_f", "negative_f"), _DESCRIPTIONS)
    return describe(dataset, _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished rows are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    rows = [(kind, bias) for kind in KINDS for bias in config.forget_biases]
    fresh = [
        Piece(
            f"fresh-{KINDS.index(kind)}-{bias:g}",
            f"fresh: {kind}, {bias:g}",
            functools.partial(_measure_row, kind, bias, config),
        )
        for kind, bias in rows
    ]
    trained = [
        Piece(
            f"train-{KINDS.index(kind)}-{bias:g}-{rate:g}",
            f"training: {kind}, {bias:g}, rate {rate:g}",
            functools.partial(_train_row, kind, bias, rate, config),
        )
        for rate in config.learning_rates
        for kind, bias in rows
    ]
    measured = command.measure([*fresh, *trained], parts=parts, screen=screen)
    numbers, num_biases = iter(measured), len(config.forget_biases)

    def by_kind() -> xr.Dataset:
        of_kinds = [xr.concat([next(numbers) for _ in range(num_biases)], dim="forget_bias") for _ in KINDS]
        return xr.concat(of_kinds, dim="kind")

    dataset = by_kind().merge(xr.concat([by_kind() for _ in config.learning_rates], dim="learning_rate"))
    dataset = dataset.assign_coords(
        kind=list(KINDS),
        forget_bias=list(config.forget_biases),
        learning_rate=list(config.learning_rates),
        path=list(PATHS),
        lag=np.arange(config.steps + 1),
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
        trial=np.arange(config.first_seed, config.first_seed + config.train_seeds),
        evaluation=np.arange(0, config.updates + 1, config.eval_every),
    )
    dataset.attrs = command.provenance(
        "gate_activation", config, seconds=time.perf_counter() - started, baseline=_task(config).baseline
    )
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------


def _row(dataset: xr.Dataset, kind: str, bias: float) -> xr.Dataset:
    return dataset.sel(kind=kind, forget_bias=bias)


def best_rate(row: xr.Dataset) -> xr.Dataset:
    """Returns the row at the learning rate at which most seeds solve the task, of equal ones the faster."""
    solved = row["updates_to_solve"]
    longest = float(row["evaluation"][-1])
    order = [
        (-int(at.notnull().sum()), float(at.fillna(longest).mean())) for at in solved.transpose("learning_rate", ...)
    ]
    return row.isel(learning_rate=order.index(min(order)))


def _solved(best: xr.Dataset) -> str:
    diverged = int((best["failed_at"] >= 0).sum())
    return f"{_num_solved(best)} of {best.sizes['trial']}" + (f", {diverged} diverged" if diverged else "")


def _num_solved(best: xr.Dataset) -> int:
    return int(best["updates_to_solve"].notnull().sum())


def _updates(best: xr.Dataset) -> np.ndarray:
    """Updates until solved, the whole budget where it was not."""
    return best["updates_to_solve"].fillna(float(best["evaluation"][-1])).values


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first."""
    config = json.loads(dataset.attrs["config"])
    shown = rich.table.Table(
        title=f"LSTM gates: retention of c at lag {config['steps']} (N={config['hidden_size']}, {config['seeds']} "
        f"seeds), adding problem T={config['task_steps']} ({config['train_seeds']} seeds, {config['updates']} updates "
        "at the most)",
        caption="medians over seeds [95 % bootstrap interval]; updates: median, unsolved trials counted as the whole "
        "budget, at the better learning rate",
        title_justify="left",
        caption_justify="left",
    )
    names = ("gates", "b_f", "f", "f < 0", "full chain (nats)", "direct path (nats)", "solved", "updates", "rate")
    for name in names:
        shown.add_column(name, justify="left" if name == "gates" else "right")
    for kind in dataset["kind"].values.tolist():
        for bias in dataset["forget_bias"].values.tolist():
            row = _row(dataset, kind, bias)
            last, best = row.isel(lag=-1), best_rate(row)
            retained = [
                interval_text(
                    Interval(*(last[f"log_retention_{part}"].sel(path=path).values for part in Interval._fields)), ".1f"
                )
                for path in PATHS
            ]
            shown.add_row(
                kind,
                f"{bias:g}",
                f"{float(row['mean_f_median']):.2f}",
                f"{100 * float(row['negative_f_median']):.0f} %",
                *(text.replace(" [", "\n[") for text in retained),
                _solved(best),
                f"{np.median(_updates(best)):.0f}",
                f"{float(best['learning_rate']):g}",
            )
    return shown


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns two deciding checks for every row of tanh gates: retention, and updates to learn."""
    checks = []
    for bias in dataset["forget_bias"].values.tolist():
        ours = _row(dataset, "sigmoid", bias)
        for kind in KINDS[1:]:
            theirs = _row(dataset, kind, bias)
            label = f"{kind}, b_f = {bias:g}"
            at = [row["log_retention"].sel(path="full").isel(lag=-1).values for row in (ours, theirs)]
            apart = median_interval(at[0] - at[1], axis=0)
            checks.append(
                Check(
                    f"retention at lag {int(dataset['lag'][-1])}: {label}",
                    f"sigmoid keeps e^{interval_text(apart, '.1f')} times as much",
                    "> e^0",
                    # judged by the side of the interval that speaks against the claim
                    None if np.isnan(apart.low) else bool(apart.low > 0),
                    "D5",
                    WHY_RETENTION,
                )
            )
            best = best_rate(ours), best_rate(theirs)
            more = median_interval(_updates(best[1]) - _updates(best[0]), axis=0)
            solved = [_num_solved(trials) for trials in best]
            checks.append(
                Check(
                    f"adding problem: {label}",
                    f"solved by {solved[1]} of {best[1].sizes['trial']} (sigmoid {solved[0]}), "
                    f"{interval_text(more, '.0f')} updates more",
                    "> 0",
                    bool(more.low > 0) if any(solved) else None,
                    "D5",
                    WHY_LEARNING,
                )
            )
            share = float(theirs["negative_f_median"])
            if kind == "tanh, same value":
                checks.append(
                    Check(
                        f"prediction: gates change sign: {label}", f"{100 * share:.1f} % of f below 0", "> 0 %",
                        share > 0, "D5", WHY_NEGATIVE, decides=False,
                    )
                )  # fmt: skip
    return checks


def _where(checks: list[Check]) -> str:
    """The forget biases at which these checks hold."""
    tried = [check for check in checks if check.holds is not None]
    holding = [check.name.rsplit("b_f = ", 1)[1] for check in tried if check.holds]
    if not tried:
        return "untried"
    return "at every b_f" if len(holding) == len(tried) else f"at b_f = {', '.join(holding)}" if holding else "at none"


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding in a few sentences."""
    every = [check for check in verdict(dataset) if check.decides]
    lag, sentences = int(dataset["lag"][-1]), []
    for kind in KINDS[1:]:
        retained, learned = (
            [check for check in every if kind in check.name and check.name.startswith(what)]
            for what in ("retention", "adding")
        )
        kept = []
        for bias in dataset["forget_bias"].values.tolist():
            at = [
                _row(dataset, of, bias)["log_retention"].sel(path="full").isel(lag=-1).values for of in (KINDS[0], kind)
            ]
            kept.append(float(median_interval(at[0] - at[1], axis=0).median) / np.log(10))
        low, high = (f"10^{value:.1f}" for value in (min(kept), max(kept)))
        sentences.append(
            f"against “{kind}” the sigmoid keeps more of the memory's gradient over {lag} steps {_where(retained)} "
            f"(over all b_f {low if low == high else f'{low} to {high}'} times as much) and learns adding in fewer "
            f"updates {_where(learned)}"
        )
    rates = []
    for at in dataset["learning_rate"].values.tolist():
        solved = dataset["updates_to_solve"].sel(learning_rate=at).notnull().sum(["forget_bias", "trial"])
        rates.append(f"{', '.join(str(int(solved.sel(kind=kind))) for kind in KINDS)} at rate {at:g}")
    trials = dataset.sizes["trial"] * dataset.sizes["forget_bias"]
    return {"D5": f"{'; '.join(sentences)}.  Of {trials} trials each ({'; '.join(KINDS)}) learn {'; '.join(rates)}."}


_STYLES: dict[str, dict[str, Any]] = {
    "sigmoid": {"color": "#16325c", "linestyle": "-"},
    "tanh, same bias": {"color": "#c81e4a", "linestyle": ":"},
    "tanh, same value": {"color": "#d97706", "linestyle": "--"},
}


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: retention above, learning below, one column for each forget bias."""
    config = json.loads(dataset.attrs["config"])
    biases = dataset["forget_bias"].values.tolist()
    drawn = matplotlib.figure.Figure(figsize=(3.5 * max(len(biases), 2) + 0.6, 6.8), layout="constrained")
    grid = drawn.subplots(2, len(biases), squeeze=False, sharex="row", sharey="row")
    for column, bias in enumerate(biases):
        above, below = grid[:, column]
        for kind, style in _STYLES.items():
            row = _row(dataset, kind, bias)
            at = row.sel(path="full")
            median, low, high = (at[f"log_retention_{part}"].values for part in Interval._fields)
            above.plot(row["lag"].values, median, linewidth=2, **style)
            above.fill_between(row["lag"].values, low, high, color=style["color"], alpha=0.2, linewidth=0)
            best = best_rate(row)
            for trial in best["test_loss"].transpose("trial", "evaluation").values:
                below.plot(best["evaluation"].values, trial, linewidth=1.2, alpha=0.85, **style)
        above.set_title(f"b_f = {bias:g}: f starts at {scipy.special.expit(bias):.2f}", fontsize=11)
        above.set_xlabel("lag (steps)")
        below.axhline(SOLVED * dataset.attrs["baseline"], color="0.5", linewidth=0.8)
        below.set_yscale("log")
        below.set_xlabel("updates")
    grid[0, 0].set_ylabel("log retention of c (nats)")
    grid[1, 0].set_ylabel("held-out squared error, adding")
    solved, across = SOLVED * dataset.attrs["baseline"], grid[1, 0].get_yaxis_transform()
    grid[1, 0].text(0.98, 0.95 * solved, "solved", transform=across, ha="right", va="top", fontsize=9, color="0.3")
    for axes in grid.ravel():
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [matplotlib.lines.Line2D([], [], linewidth=2, label=kind, **style) for kind, style in _STYLES.items()]
    drawn.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, title="gates i, f, o")
    drawn.suptitle(
        "Do LSTM gates want the sigmoid?  Above: how much of the memory's gradient fresh networks keep "
        f"(N={config['hidden_size']}, {config['seeds']} seeds: median, 95 % interval)\n"
        f"Below: learning the adding problem, T={config['task_steps']}, {config['train_seeds']} seeds, each row at its "
        "better learning rate; a line ends when solved",
        fontsize=10.5,
    )
    return drawn


ABOUT = """Do the gates of an LSTM want the sigmoid rather than tanh?

Swaps the activation of i, f and o, with the same biases and with biases that give the same value of the gates;
measures retention of the memory in fresh networks and learning of the adding problem, and writes a table, a figure and
a netCDF file."""

CAPTION = """LSTM with sigmoid gates, with tanh gates of the same bias, and with tanh gates of the same value, for three
forget biases: log retention of the memory's gradient against lag in fresh networks, and held-out error on the adding
problem against updates, one line a seed."""

EXPERIMENT = command.Experiment(
    name="gate_activation",
    about=ABOUT,
    claims=CLAIMS,
    default=Config(),
    smoke=SMOKE,
    run=run,
    table=table,
    verdict=verdict,
    summary=summary,
    pictures=(command.Picture("", CAPTION, figure),),
)


if __name__ == "__main__":
    command.main(EXPERIMENT)
