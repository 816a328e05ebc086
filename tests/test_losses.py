"""Losses against closed forms, SciPy and optax; what masks, steps and reductions mean."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from rnngrad import losses

T, B, V = 6, 3, 5  # all different, so that a swapped axis cannot pass

# one program in place of one for each operation; `test_jit_is_no_jit` says that nothing else changes
cross_entropy = jax.jit(losses.cross_entropy, static_argnames=("steps", "reduction"))
mse = jax.jit(losses.mse, static_argnames=("steps", "reduction"))


def raises(*words):
    return pytest.raises(ValueError, match=".*".join(map(re.escape, words)))


def example(dtype=jnp.float32, seed=0):
    key_logits, key_targets = jax.random.split(jax.random.key(seed))
    logits = 3 * jax.random.normal(key_logits, (T, B, V), dtype)
    return logits, jax.random.randint(key_targets, (T, B), 0, V)


LENGTHS = np.array([6, 2, 4])
MASK = (np.arange(T)[:, None] < LENGTHS).astype(np.float32)


def by_step(logits, targets):
    """ℓ by SciPy."""
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets)
    return scipy.special.logsumexp(logits, axis=-1) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


# --- cross-entropy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
@pytest.mark.parametrize("steps", losses.STEPS)
@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_cross_entropy_against_scipy_by_loops(mask, steps, reduction, x64):
    logits, targets = example(jnp.float64)
    terms = by_step(logits, targets)
    chosen = []
    for b in range(B):
        length = T if mask is None else LENGTHS[b]
        chosen.append([terms[t, b] for t in range(length)][-1:] if steps == "last" else terms[:length, b])
    expected = np.concatenate(chosen).mean() if reduction == "mean_per_token" else np.mean([sum(c) for c in chosen])
    found = cross_entropy(logits, targets, mask, steps=steps, reduction=reduction)
    assert float(found) == pytest.approx(expected, rel=1e-14)  # a few roundings of float64


def test_gradient_is_softmax_minus_onehot(x64):
    logits, targets = example(jnp.float64)
    found = jax.jit(jax.grad(cross_entropy))(logits, targets, MASK)
    expected = (scipy.special.softmax(logits, axis=-1) - np.eye(V)[targets]) * MASK[..., None] / MASK.sum()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-16)  # terms below 1, a few roundings


def test_equals_optax():
    logits, targets = example()
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    np.testing.assert_allclose(cross_entropy(logits, targets), expected, rtol=1e-6)  # float32
    predictions, numbers = logits[..., :2], logits[..., 2:4]
    expected = optax.squared_error(predictions, numbers).mean()
    np.testing.assert_allclose(mse(predictions, numbers), expected, rtol=1e-6)


@pytest.mark.parametrize("batch", [(), (B,)], ids=["one sequence", "batch"])
def test_sum_over_steps_is_t_times_the_mean(batch, x64):
    logits, targets = example(jnp.float64)
    logits, targets = (logits, targets) if batch else (logits[:, 0], targets[:, 0])
    of = lambda reduction: jax.value_and_grad(lambda y: cross_entropy(y, targets, reduction=reduction))(logits)
    (mean, mean_grad), (total, total_grad) = of("mean_per_token"), of("sum_over_steps")
    assert float(total) == pytest.approx(T * float(mean), rel=1e-14)
    np.testing.assert_allclose(total_grad, T * mean_grad, rtol=1e-14, atol=1e-17)
    error = lambda reduction: mse(logits, logits - 2.0, reduction=reduction)
    np.testing.assert_allclose(error("sum_over_steps"), T * error("mean_per_token"), rtol=1e-14)
    np.testing.assert_allclose(error("mean_per_token"), 4.0, rtol=1e-14)


def test_uniform_logits_give_log_v():
    targets = jnp.arange(T) % V
    assert float(cross_entropy(jnp.zeros((T, V)), targets)) == pytest.approx(np.log(V), rel=1e-6)


@pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
def test_large_logits_neither_overflow_nor_lose_the_gradient(size):
    logits = jnp.zeros((2, 3)).at[:, 0].set(size)
    targets = jnp.array([0, 1])
    value, gradient = jax.jit(jax.value_and_grad(cross_entropy))(logits, targets)
    # one term is 0 and the other |size|, or for a negative one |size| + log 2 and log 2
    expected = size / 2 if size > 0 else -size / 2 + np.log(2)
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert bool(jnp.isfinite(gradient).all())
    assert float(jnp.abs(gradient).sum()) > 0.4


def test_a_class_that_is_ruled_out_is_none_of_the_others():
    logits = jnp.array([[0.0, -jnp.inf, 0.0]])
    value, gradient = jax.jit(jax.value_and_grad(cross_entropy))(logits, jnp.array([0]))
    assert float(value) == pytest.approx(np.log(2), rel=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5, 0, 0.5]], rtol=1e-6)


def test_bfloat16_is_reduced_in_float32():
    logits = jnp.zeros((3000, V), jnp.bfloat16)  # a sum of 3000 ones in bfloat16 stops at 256
    found = cross_entropy(logits, jnp.zeros(3000, int), reduction="sum_over_steps")
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(3000 * np.log(V), rel=1e-5)
    assert jax.grad(cross_entropy)(logits, jnp.zeros(3000, int)).dtype == jnp.bfloat16


def test_jit_is_no_jit():
    logits, targets = example()
    for steps in losses.STEPS:
        plain = losses.cross_entropy(logits, targets, MASK, steps=steps)
        jitted = jax.jit(losses.cross_entropy, static_argnames="steps")(logits, targets, MASK, steps=steps)
        np.testing.assert_allclose(jitted, plain, rtol=1e-6)


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("steps", losses.STEPS)
def test_what_stands_at_masked_steps_does_not_act(bad, steps):
    logits, targets = example()
    is_masked = MASK == 0
    spoilt = jnp.where(is_masked[..., None], bad, logits)
    spoilt_targets = jnp.where(is_masked, -1, targets)  # padding that is no class
    loss = lambda y, targets: losses.cross_entropy(y, targets, MASK, steps=steps)
    value, gradient = jax.value_and_grad(loss)(spoilt, spoilt_targets)
    assert float(value) == float(loss(logits, targets))
    np.testing.assert_array_equal(gradient, jax.grad(loss)(logits, targets))
    error = lambda p: losses.mse(p, jnp.zeros_like(p), MASK, steps=steps)
    assert float(error(spoilt)) == float(error(logits))
    np.testing.assert_array_equal(jax.grad(error)(spoilt), jax.grad(error)(logits))


def test_unequal_lengths_equal_the_sequences_one_by_one(x64):
    logits, targets = example(jnp.float64)
    alone = [cross_entropy(logits[:n, b], targets[:n, b]) for b, n in enumerate(LENGTHS)]
    batch = cross_entropy(logits, targets, MASK)
    assert float(batch) == pytest.approx(np.average(alone, weights=LENGTHS), rel=1e-14)
    batch = cross_entropy(logits, targets, MASK, reduction="sum_over_steps")
    assert float(batch) == pytest.approx(np.mean(LENGTHS * np.array(alone)), rel=1e-14)


def test_last_counts_the_last_unmasked_step_also_after_gaps():
    logits, targets = example()
    mask = np.zeros((T, B), bool)
    mask[[1, 3], 0] = mask[0, 1] = mask[T - 1, 2] = True
    terms = by_step(logits, targets)
    expected = np.mean([terms[3, 0], terms[0, 1], terms[T - 1, 2]])
    found = cross_entropy(logits, targets, mask, steps="last")
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_a_padded_sequence_does_not_count_in_the_mean_over_the_batch():
    logits, targets = example()
    mask = MASK.copy()
    mask[:, 1] = 0
    for reduction in losses.REDUCTIONS:
        of = lambda pick, r=reduction: cross_entropy(logits[:, pick], targets[:, pick], mask[:, pick], reduction=r)
        assert float(of([0, 1, 2])) == pytest.approx(float(of([0, 2])), rel=1e-6)


def test_weights_scale_their_steps():
    logits, targets = example()
    weights = 0.5 * MASK
    weights[0] = 2
    expected = np.average(by_step(logits, targets), weights=weights)
    assert float(cross_entropy(logits, targets, weights)) == pytest.approx(expected, rel=1e-6)


def test_a_mask_of_zeros_is_an_error_where_it_is_known_and_no_nan_under_jit():
    logits, targets = example()
    zeros = jnp.zeros((T, B))
    for function, numbers in ((losses.cross_entropy, targets), (losses.mse, logits), (losses.accuracy, targets)):
        with raises("mask: expected a step that counts, found zeros alone"):
            function(logits, numbers, zeros)
        assert float(jax.jit(function)(logits, numbers, zeros)) == 0
        # what float32 cannot hold, or compiled code takes for 0, leaves no step either
        for tiny in (1e-60, 1e-40):
            with raises("mask: expected a step that counts, found zeros alone (in float32)"):
                function(logits, numbers, np.full((T, B), tiny))
    for reduction in losses.REDUCTIONS:
        loss = lambda y, mask, r=reduction: losses.cross_entropy(y, targets, mask, reduction=r)
        assert not jax.jit(jax.grad(loss))(logits, zeros).any()


# --- mse, accuracy, units --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_mse_by_loops(reduction, x64):
    predictions = jax.random.normal(jax.random.key(0), (T, B, 2), jnp.float64)
    targets = jax.random.normal(jax.random.key(1), (T, B, 2), jnp.float64)
    terms = np.mean((np.asarray(predictions) - np.asarray(targets)) ** 2, axis=-1)
    each = [terms[:n, b] for b, n in enumerate(LENGTHS)]
    expected = np.concatenate(each).mean() if reduction == "mean_per_token" else np.mean([sum(e) for e in each])
    found = mse(predictions, targets, MASK, reduction=reduction)
    assert float(found) == pytest.approx(expected, rel=1e-14)
    last = mse(predictions, targets, MASK, steps="last", reduction=reduction)
    assert float(last) == pytest.approx(np.mean([e[-1] for e in each]), rel=1e-14)


def test_accuracy_counts():
    logits, targets = example()
    is_right = np.asarray(logits).argmax(-1) == np.asarray(targets)
    assert 0 < is_right.mean() < 1
    assert float(losses.accuracy(logits, targets)) == pytest.approx(is_right.mean(), rel=1e-6)
    assert float(losses.accuracy(logits, targets, MASK)) == pytest.approx(is_right[MASK > 0].mean(), rel=1e-6)
    last = np.mean([is_right[n - 1, b] for b, n in enumerate(LENGTHS)])
    assert float(losses.accuracy(logits, targets, MASK, steps="last")) == pytest.approx(last, rel=1e-6)


def test_units(x64):
    v = 50
    nats = cross_entropy(jnp.zeros((T, v), jnp.float64), jnp.zeros(T, int))
    assert float(losses.perplexity(nats)) == pytest.approx(v, rel=1e-13)
    assert 2 ** float(losses.bits_per_character(nats)) == pytest.approx(v, rel=1e-13)
    assert float(losses.bits_per_character(float(np.log(2)))) == pytest.approx(1, rel=1e-15)


# --- read-out --------------------------------------------------------------------------------------------------------


def test_readout_is_v_h_plus_c_on_the_last_axis(x64):
    out = losses.readout(4, 3, dtype=jnp.float64)
    params = out.init(jax.random.key(0))
    assert (params.w.shape, params.b.shape) == ((3, 4), (3,))
    h = jax.random.normal(jax.random.key(1), (T, B, 4), jnp.float64)
    expected = np.asarray(h) @ np.asarray(params.w).T + np.asarray(params.b)
    np.testing.assert_allclose(out.apply(params, h), expected, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(out.apply(params, h[0, 0]), expected[0, 0], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("init", "std_w", "std_b"),
    # U(±1/√N): std 1/√(3N); Glorot √(2/(N+K)); LeCun 1/√N
    [
        ("torch", (3 * 100) ** -0.5, (3 * 100) ** -0.5),
        ("keras", (2 / 500) ** 0.5, 0),
        ("flax", 100**-0.5, 0),
        ("zeros", 0, 0),
    ],
)
def test_readout_draws(init, std_w, std_b):
    params = losses.readout(100, 400, init=init).init(jax.random.key(0))
    # 40,000 and 400 draws: the standard deviation of an estimated std is below 0.4 % and 4 % of it; five of these
    assert float(params.w.std()) == pytest.approx(std_w, rel=0.02)
    assert float(params.b.std()) == pytest.approx(std_b, rel=0.2)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_says_what_was_expected_and_found():
    logits, targets = example()
    with raises("unknown steps 'first'; expected one of: all, last"):
        losses.cross_entropy(logits, targets, steps="first")
    for function in (losses.cross_entropy, losses.mse):
        with raises("unknown reduction 'mean'; expected one of: mean_per_token, sum_over_steps"):
            function(logits, targets, reduction="mean")
    for function in (losses.cross_entropy, losses.accuracy):
        with raises("targets: expected integers of shape (6, 3), found int32[6]"):
            function(logits, targets[:, 0])
        with raises("targets: expected integers of shape (6, 3), found float32[6, 3]"):
            function(logits, targets.astype(jnp.float32))
        with raises("logits: expected floating (T, V) or (T, B, V), found int32[6, 3]"):
            function(targets, targets)
    with raises("mask: expected shape (6, 3), found (6,)"):
        losses.cross_entropy(logits, targets, jnp.ones(T))
    # 1e300 is infinite in float32, in which the loss of these logits is computed
    for bad in (-1.0, np.nan, np.inf, 1e300):
        mask = np.ones((T, B))
        mask[2, 1] = bad
        with raises(f"mask: expected weights of at least 0, finite in float32, found {bad}"):
            losses.cross_entropy(logits, targets, mask)
    with raises("expected targets of shape (T,) or (T, B) with at least one step, found (0, 3)"):
        losses.cross_entropy(logits[:0], targets[:0])
    with raises("expected targets of shape (T,) or (T, B) with at least one step, found ()"):
        losses.cross_entropy(logits[0, 0], targets[0, 0])
    with raises("targets: expected float32[6, 3, 5], found float32[6, 3, 4]"):
        losses.mse(logits, logits[..., :4])
    with raises("predictions: expected floating (T, K) or (T, B, K), found int32[6, 3]"):
        losses.mse(targets, targets)
    with raises("hidden_size: expected at least 1, found 0"):
        losses.readout(0, 3)
    with raises("unknown initialisation 'he'; expected one of: torch, keras, flax, zeros"):
        losses.readout(4, 3, init="he")
    with raises("dtype: expected a floating dtype, found int32"):
        losses.readout(4, 3, dtype=jnp.int32)


@pytest.mark.parametrize("bad", [-1, V])
def test_a_target_that_is_no_class_is_an_error_where_it_is_known_and_nan_under_jit(bad):
    logits, targets = example()
    targets = targets.at[2, 1].set(bad)
    with raises(f"targets: expected classes 0 to 4, found {bad}"):
        losses.cross_entropy(logits, targets)
    assert bool(jnp.isnan(jax.jit(losses.cross_entropy)(logits, targets)))


def test_nan_in_the_logits_is_not_hidden():
    logits, targets = example()
    assert bool(jnp.isnan(losses.cross_entropy(logits.at[2, 1, 0].set(jnp.nan), targets)))
    assert bool(jnp.isnan(losses.mse(logits.at[2, 1, 0].set(jnp.nan), logits)))
    spoilt = logits.at[T - 1, 1, 0].set(jnp.nan)  # at a step that MASK leaves out
    assert bool(jnp.isnan(losses.accuracy(spoilt, targets)))
    assert float(losses.accuracy(spoilt, targets, MASK)) == float(losses.accuracy(logits, targets, MASK))
    # one NaN per step, so that no step is left whose largest logit means something
    assert bool(jnp.isnan(losses.accuracy(jnp.full((T, V), jnp.nan), jnp.zeros(T, int))))


def test_one_step():
    logits, targets = example()
    terms = by_step(logits, targets)[0]
    for steps in losses.STEPS:
        for reduction in losses.REDUCTIONS:
            found = losses.cross_entropy(logits[:1], targets[:1], steps=steps, reduction=reduction)
            assert float(found) == pytest.approx(terms.mean(), rel=1e-6)
