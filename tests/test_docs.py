"""The documentation: its examples run, its links lead somewhere, its errata and numbers are shown here or elsewhere."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import math
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnngrad as rg
from experiments import errata
from tests.test_lyapunov import lstm_run

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])


def fences(page):
    """Language and text of every fenced block."""
    return re.findall(r"^```(\S*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def prose(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def slug(heading):
    """A heading's anchor, as repositories' web pages make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def load_conf():
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- pages -----------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_table_of_contents():
    (toctree,) = [text for language, text in fences(DOCS / "index.md") if language == "{toctree}"]
    listed = [line for line in toctree.split() if not line.startswith(":")]
    assert sorted(listed) == sorted(page.stem for page in PAGES if page.stem != "index")


@each_page
def test_every_block_of_code_is_an_example(page):
    """So that the next test, and `make docs`, run all of them."""
    assert {language for language, _ in fences(page)} <= {"pycon", "math", "{toctree}", "{eval-rst}"}
    for language, text in fences(page):
        assert language != "pycon" or text.startswith(">>> ")


@pytest.mark.slow
@each_page
def test_examples_run(page):
    """One after the other, as a reader would type them; `make docs` does the same without strict promotion."""
    code = "".join(text for language, text in fences(page) if language == "pycon")
    test = doctest.DocTestParser().get_doctest(code, {}, page.stem, str(page), 0)
    printed = []
    result = doctest.DocTestRunner().run(test, out=printed.append)
    assert result.failed == 0, "".join(printed)
    assert bool(test.examples) == (">>>" in page.read_text(encoding="utf-8"))


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        parts = urllib.parse.urlsplit(target)
        if parts.scheme:
            assert parts.scheme == "https", target
            assert re.fullmatch(r"[\w.-]+\.[a-z]+", parts.netloc), target
            continue
        file = (page.parent / parts.path).resolve() if parts.path else page
        assert file.is_file(), target
        assert file.is_relative_to(ROOT), target
        if parts.fragment:
            headings = re.findall(r"^#+ (.*)$", prose(file), flags=re.MULTILINE)
            assert parts.fragment in {slug(heading) for heading in headings}, target


@each_page
def test_tests_and_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for file, name in re.findall(r"tests/(\w+)\.py(?:::(\w+))?", text):
        module = importlib.import_module(f"tests.{file}")
        assert not name or hasattr(module, name), (file, name)
    for path in re.findall(r"\brg\.([a-z_A-Z.]*[a-zA-Z])\b", text):
        value = rg
        for part in path.split("."):
            assert hasattr(value, part), path
            value = getattr(value, part)


def test_reference_shows_every_public_name():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    single = re.findall(r"^\.\. auto(function|class):: rnngrad\.(\w+)$", text, flags=re.MULTILINE)
    blocks = re.findall(r"^\.\. automodule:: rnngrad\.([\w.]+)\n((?:   :.*\n)*)", text, flags=re.MULTILINE)
    modules = {path for path, options in blocks if ":no-members:" not in options}
    public = {name: getattr(rg, name) for name in rg.__all__}
    assert modules == {name for name, value in public.items() if inspect.ismodule(value)}
    assert len({name for _, name in single}) == len(single)
    for name in (
        set(public) - modules - {name for _, name in single}
    ):  # shown with their module, as rg.losses.readout is
        module = public[name].__module__.removeprefix("rnngrad.")
        assert module in modules, name
        assert hasattr(public[module], name), name
    assert all(inspect.isclass(public[name]) == (kind == "class") for kind, name in single)


# --- building --------------------------------------------------------------------------------------------------------


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="b.html#there">1</a><a href="b.html#gone">2</a><a href="c.html">3</a>'
        '<a href="#top">4</a><a href="#bottom">5</a><a href="https://example.org/x">6</a><img src="no.png">'
    )
    (tmp_path / "b.html").write_text('<p id="there">B</p>')
    assert load_conf().broken_links(tmp_path) == [
        "a.html: b.html#gone",
        "a.html: c.html",
        "a.html: #bottom",
        "a.html: no.png",
    ]


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        site = (tmp_path / f"{page.stem}.html").read_text(encoding="utf-8")
        # to be read without a network: formulas are MathML, and nothing is fetched from elsewhere
        assert "$" not in re.sub(r"<(pre|code|script).*?</\1>|<[^>]*>", "", site, flags=re.DOTALL)
        assert not re.search(r'<(script|img)[^>]*src="https?:|<link[^>]*rel="stylesheet"[^>]*href="https?:', site)
    assert "<math" in (tmp_path / "derivations.html").read_text(encoding="utf-8")
    shown = (tmp_path / "errata.html").read_text(encoding="utf-8")
    for erratum in errata.ERRATA:
        assert erratum.test in shown


# --- errata ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("erratum", errata.ERRATA, ids=[str(n + 1) for n in range(len(errata.ERRATA))])
def test_every_erratum_is_whole_and_its_test_exists(erratum):
    assert all(field.strip() == field and field for field in erratum)
    file, name = re.fullmatch(r"tests/(\w+)\.py::(\w+)", erratum.test).groups()
    assert callable(getattr(importlib.import_module(f"tests.{file}"), name))


def test_errata_are_written_as_they_are():
    """The page is what `python -m experiments.errata` writes, and Markdown changes no letter of an erratum."""
    stored = errata.PAGE.read_text(encoding="utf-8")
    assert stored == errata.page(stored)
    text = errata.markdown()
    assert text.count("\n## ") + 1 == len(errata.ERRATA)
    assert text.startswith("## 1. ")
    for erratum in errata.ERRATA:
        assert erratum.said in re.sub(r"\\(.)", r"\1", text)
        assert not re.search(r"(?<!\\)[*|<>\[\]_]", errata._plain(" ".join(erratum)))


def decaying(rate):
    """Retention over 100 steps of s' = e^rate s, which is e^{rate lag} exactly."""
    cell = rg.map_cell(lambda s, x: jnp.exp(jnp.float32(rate)) * s)
    return rg.retention(cell, None, jnp.ones(3), jnp.zeros((100, 0)))


def test_the_two_decay_figures_of_the_rnn_contradict_each_other():
    """e^{−0.5 t} leaves 1.9e-22 after 100 steps, not 1e-10, which is a rate of −0.230."""
    steep, shallow = decaying(-0.5), decaying(math.log(1e-10) / 100)
    # log-scaled float32 products of 100 factors, each right to 6e-8
    assert math.exp(float(steep.log_norm[100])) == pytest.approx(1.9e-22, rel=0.02)
    assert float(steep.log_norm[100]) == pytest.approx(-50, abs=1e-4)
    assert math.exp(float(shallow.log_norm[100])) == pytest.approx(1e-10, rel=1e-4)
    assert round(float(rg.decay_rate(shallow.log_norm, (0, 100))), 3) == -0.230
    decades = (shallow.log_norm[100] - steep.log_norm[100]) / math.log(10)
    assert round(float(decades), 1) == 11.7


def test_the_two_decay_figures_of_the_lstm_contradict_each_other():
    """e^{−0.01 t} leaves 0.37 after 100 steps, not 1e-2, a rate of −0.046; with constant gates b_f = 4.6 and 3.05."""
    shallow, steep = decaying(-0.01), decaying(math.log(1e-2) / 100)
    assert round(math.exp(float(shallow.log_norm[100])), 2) == 0.37
    assert round(math.exp(float(steep.log_norm[100])), 4) == 0.01
    assert round(float(rg.decay_rate(steep.log_norm, (0, 100))), 3) == -0.046
    for curve, bias in ((shallow, 4.6), (steep, 3.05)):
        left = math.exp(float(curve.log_norm[100]))
        assert rg.theory.forget_bias_for(left, 100) == pytest.approx(bias, abs=0.006)
        # and in an LSTM whose gates are constant
        cell = rg.cells.lstm(2, 4, forget_bias=bias)
        params = cell.init(jax.random.key(0))
        params = params._replace(w_ih=jnp.zeros_like(params.w_ih), w_hh=jnp.zeros_like(params.w_hh))
        forget_bias_only = jnp.where(jnp.arange(params.b.size) // 4 == 1, jnp.float32(bias), jnp.float32(0))
        params = params._replace(b=forget_bias_only)
        kept = rg.retention(cell, params, cell.init_state(), jnp.zeros((100, 2)), of="c", wrt="c", path="direct")
        np.testing.assert_allclose(kept.log_norm, curve.log_norm, rtol=0, atol=0.03)  # biases of two digits


# --- numbers of the page on numerics ---------------------------------------------------------------------------------


def smallest_exponent(jacobians, qr_interval):
    frame, total = np.eye(jacobians.shape[-1], dtype=jacobians.dtype), 0.0
    for step, jacobian in enumerate(jacobians, start=1):
        frame = jacobian @ frame
        if step % qr_interval == 0:
            frame, triangle = np.linalg.qr(frame)
            total = total + np.log(np.abs(np.diagonal(triangle)).astype(np.float64))
    return total.min() / len(jacobians), total.max() / len(jacobians)


def test_smallest_exponent_by_qr_interval():
    """A random LSTM of 64 units in float32: the longer between QRs, the more of the last exponent is round-off."""
    jacobians = np.asarray(rg.step_jacobians(*lstm_run(64, 200)))
    assert jacobians.dtype == np.float32
    smallest, largest = smallest_exponent(jacobians.astype(np.float64), 1)
    assert round(smallest, 2) == -7.92
    for interval, stated in ((1, -7.92), (10, -2.4), (50, -0.6)):
        found, top = smallest_exponent(jacobians, interval)
        # what is round-off depends on the BLAS; the last one is right to its digits
        assert abs(found - stated) < (0.01 if interval == 1 else 0.15), interval
        assert abs(top - largest) < 1e-4


def test_condition_number_of_a_product_by_precision():
    """Ten Gaussian matrices, factors rounded as float32, TF32 and bfloat16 round them: medians over 50 draws."""

    def rounded(x, bits):
        return np.asarray(jax.lax.reduce_precision(jnp.asarray(x, jnp.float32), 8, bits))

    found = []
    for seed in range(50):
        matrices = np.random.default_rng(seed).normal(size=(10, 16, 16)) / 4
        exact = np.eye(16)
        for matrix in matrices:
            exact = matrix @ exact
        products = [exact]
        for bits in (23, 10, 7):
            product = np.eye(16, dtype=np.float32)
            for matrix in matrices:
                product = rounded(matrix, bits) @ rounded(product, bits)
            products.append(product.astype(np.float64))
        found.append([math.log10(np.linalg.cond(product)) for product in products])
    # between draws they scatter by one decade, medians of 50 by a fifth of that; round-off depends on the BLAS too
    np.testing.assert_allclose(np.median(found, axis=0), [10.2, 8.5, 6.2, 5.6], rtol=0, atol=0.3)
