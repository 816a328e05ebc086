"""Errata: what the texts behind this project got wrong, with what is right and the test that shows it.

The one place that knows them: the report is written from :data:`ERRATA`, and ``python -m experiments.errata`` writes
the page ``docs/errata.md`` from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errata.md"
MARK = "<!-- from here on written by `python -m experiments.errata` -->\n"


class Erratum(NamedTuple):
    """One mistake."""

    said: str
    """As it circulates."""
    source: str
    """Where."""
    correct: str
    """The statement that is true."""
    why: str
    """Its derivation, in two lines."""
    test: str
    """The test that shows it, ``file::function``."""


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        said="sup σ' = 1 for the logistic function, so that ‖diag(σ')‖ ≤ 1 enters the bound on ∂h_t/∂h_k.",
        source="introductions that give one bound for tanh and sigmoid (claim A2)",
        correct="sup σ' = 1/4, reached at z = 0. The bound with 1 is true and, where σ_max(U) ≥ 1, excludes nothing.",
        why="σ' = σ(1 − σ) = 1/4 − (σ − 1/2)², which is at most 1/4. "
        "Over 100 steps the two bounds differ by a factor of 4^100, 60 decades.",
        test="tests/test_formulas.py::test_sup_of_the_sigmoid_slope_is_a_quarter",
    ),
    Erratum(
        said="The gradient vanishes if the largest eigenvalue of U is below 1 / sup |φ'|: "
        "‖∂h_t/∂h_k‖ ≤ (|λ_max(U)| sup |φ'|)^(t−k).",
        source="discussions of the bound of Pascanu, Mikolov & Bengio 2013 (arXiv 1211.5063), claim A1",
        correct="‖∂h_t/∂h_k‖₂ ≤ (σ_max(U) sup |φ'|)^(t−k), with the largest singular value. "
        "The spectral radius bounds no product of different factors.",
        why="‖A B‖₂ ≤ ‖A‖₂ ‖B‖₂ and ‖U‖₂ = σ_max(U); the spectral radius is not submultiplicative. "
        "U = [[2, −2], [2, −2]] has the eigenvalue 0 alone, and diag(1, 0) U has the eigenvalue 2: its powers grow "
        "as 2^n.",
        test="tests/test_theory.py::test_spectral_radius_is_no_bound",
    ),
    Erratum(
        said="∂C_t/∂C_{t−1} = f_t.",
        source="introductions to the LSTM that take the derivative of C_t = f_t ⊙ C_{t−1} + i_t ⊙ g_t with the gates "
        "held (claim B2)",
        correct="∂C_t/∂C_{t−1} = diag(f_t) with h_{t−1} held. Followed through h_{t−1} = o_{t−1} ⊙ tanh C_{t−1} it is "
        "diag(f_t) + K diag(o_{t−1} ⊙ (1 − tanh² C_{t−1})), where K = ∂C_t/∂h_{t−1} is the sum over the three gates "
        "f, i and g. Over many steps, only the chain over (h, C) leaves nothing out.",
        why="The gates hear h_{t−1}, which was made of C_{t−1}: by the chain rule dC_t/dC_{t−1} = ∂C_t/∂C_{t−1} + "
        "∂C_t/∂h_{t−1} · ∂h_{t−1}/∂C_{t−1}. "
        "K holds diag(C_{t−1} f'_t) U_f + diag(g_t i'_t) U_i + diag(i_t g'_t) U_g, which is not 0 unless U is.",
        test="tests/test_formulas.py::test_memory_jacobian_follows_h_one_step_back",
    ),
    Erratum(
        said="∂h_t/∂h_{t−1} = Uᵀ diag(φ'(z_t)), and in other places diag(φ'(z_t)) U or U diag(φ'(z_t)), as one object.",
        source="introductions to backpropagation through time; Pascanu, Mikolov & Bengio 2013 (arXiv 1211.5063) and "
        "texts after it differ in the layout",
        correct="With outputs in rows, J_t = diag(φ'(z_t)) U: it takes tangents forward. Uᵀ diag(φ'(z_t)) = J_tᵀ takes "
        "gradients, as columns, back. U diag(φ'(z_t)) is neither.",
        why="h_t = φ(U h_{t−1} + …): row n of U is multiplied by φ'(z_n), and rows are scaled from the left. "
        "δh_{t−1} = J_tᵀ δh_t turns the order round. Norms agree, directions and products do not.",
        test="tests/test_formulas.py::test_columns_go_back_by_the_transpose_and_tangents_forward_by_the_jacobian",
    ),
    Erratum(
        said="The LSTM's gradient follows δh_t = ∂L_t/∂h_t and "
        "δc_t = δh_t ⊙ o_t ⊙ (1 − tanh² c_t) + δc_{t+1} ⊙ f_{t+1}.",
        source="introductions to the LSTM that print these lines as its backpropagation; Hochreiter & Schmidhuber 1997 "
        "call them truncated",
        correct="δh_t = ∂L_t/∂h_t + Uᵀ δz_{t+1}: h_t is heard by the four gates of the next step. Without that term it "
        "is the gradient of another run, whose gates read h_{t−1} as a constant.",
        why="h_t acts on L through L_t and through z_{t+1} = W x_{t+1} + U h_t + b; the second way adds "
        "(∂z_{t+1}/∂h_t)ᵀ δz_{t+1}. The two agree for U = 0.",
        test="tests/test_formulas.py::test_truncated_is_the_gradient_of_a_run_whose_gates_read_a_constant",
    ),
    Erratum(
        said="The vanilla RNN's gradient norm falls as e^{−0.5 t}; over 100 steps 10^−10 of it is left.",
        source="the texts behind this project, of one and the same network (claims B9 and B8)",
        correct="The two differ by 11.7 decades. e^{−0.5 t} leaves 1.9·10^−22 after 100 steps; 10^−10 after 100 steps "
        "is a rate of −0.230 nats per step.",
        why="e^{−0.5 · 100} = e^{−50} = 10^{−50 / ln 10} = 10^−21.7. ln(10^−10) / 100 = −10 · 2.303 / 100 = −0.230.",
        test="tests/test_docs.py::test_the_two_decay_figures_of_the_rnn_contradict_each_other",
    ),
    Erratum(
        said="The LSTM's gradient norm falls as e^{−0.01 t}; over 100 steps 10^−2 of it is left.",
        source="the texts behind this project, of one and the same network (claims B9 and B8)",
        correct="e^{−0.01 t} leaves 0.37 after 100 steps; 10^−2 after 100 steps is a rate of −0.046 nats per step. "
        "With constant gates the first needs a forget bias of 4.6, the second 3.05.",
        why="e^{−0.01 · 100} = e^{−1} = 0.368, and ln(10^−2) / 100 = −0.0461. "
        "f = σ(b) and f^100 = r give b = ln(f / (1 − f)) with f = r^{1/100}.",
        test="tests/test_docs.py::test_the_two_decay_figures_of_the_lstm_contradict_each_other",
    ),
)


def _plain(text: str) -> str:
    """Returns Markdown that shows ``text`` as it is: * _ [ and others mean nothing there."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|$^~" else letter for letter in text)


def markdown() -> str:
    """Returns the errata as Markdown, one section each."""
    sections = []
    for number, erratum in enumerate(ERRATA, start=1):
        sections.append(
            f"## {number}. {_plain(erratum.said)}\n\n"
            f"**Said by** {_plain(erratum.source)}.\n\n"
            f"**Correct.** {_plain(erratum.correct)}\n\n"
            f"**Why.** {_plain(erratum.why)}\n\n"
            f"**Shown by** `{erratum.test}`\n"
        )
    return "\n".join(sections)


def page(text: str) -> str:
    """Returns the page with all that follows :data:`MARK` written anew."""
    return text[: text.index(MARK) + len(MARK)] + "\n" + markdown()


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.name}: {len(ERRATA)} errata")
