"""rnngrad: how far back a recurrent network's gradient reaches, along which paths, and why it fades."""

from rnngrad import cells, formulas, initializers, interop, logscaled, losses, remedies, tasks, theory, training
from rnngrad.cells.map import map_cell
from rnngrad.diagnose import Diagnosis, Finding, diagnose
from rnngrad.gradients import (
    ForwardGradient,
    GradientFlow,
    StateCotangents,
    TruncatedGradient,
    bptt,
    rtrl,
    truncated_bptt,
)
from rnngrad.init_report import InitReport, init_report
from rnngrad.jacobians import gate_names, jacobian_chain, prefix_products, step_jacobians
from rnngrad.logscaled import LogScaled
from rnngrad.losses import Readout, ReadoutParams, readout
from rnngrad.lyapunov import CovariantVectors, LyapunovSpectrum, covariant_vectors, lyapunov_spectrum
from rnngrad.parallel import ParallelRun, parallel_chain, parallel_retention, parallel_unroll
from rnngrad.paths import GradientPaths, gradient_paths
from rnngrad.probes import ProbedCurve, ProbedSpectralNorm, probe_retention, probe_spectral_norm
from rnngrad.retention import (
    Certificate,
    RetentionCurve,
    certificate,
    decay_rate,
    half_life,
    naive_retention,
    retention,
)
from rnngrad.singular_values import ChainSingularValues, chain_singular_values
from rnngrad.types import Cell, Trajectory
from rnngrad.unroll import Taps, unroll, zero_taps
from rnngrad.watch import Watch, watch

__version__ = "0.1.0"

__all__ = [
    "Cell",
    "Certificate",
    "ChainSingularValues",
    "CovariantVectors",
    "Diagnosis",
    "Finding",
    "ForwardGradient",
    "GradientFlow",
    "GradientPaths",
    "InitReport",
    "LogScaled",
    "LyapunovSpectrum",
    "ParallelRun",
    "ProbedCurve",
    "ProbedSpectralNorm",
    "Readout",
    "ReadoutParams",
    "RetentionCurve",
    "StateCotangents",
    "Taps",
    "Trajectory",
    "TruncatedGradient",
    "Watch",
    "bptt",
    "cells",
    "certificate",
    "chain_singular_values",
    "covariant_vectors",
    "decay_rate",
    "diagnose",
    "formulas",
    "gate_names",
    "gradient_paths",
    "half_life",
    "init_report",
    "initializers",
    "interop",
    "jacobian_chain",
    "logscaled",
    "losses",
    "lyapunov_spectrum",
    "map_cell",
    "naive_retention",
    "parallel_chain",
    "parallel_retention",
    "parallel_unroll",
    "prefix_products",
    "probe_retention",
    "probe_spectral_norm",
    "readout",
    "remedies",
    "retention",
    "rtrl",
    "step_jacobians",
    "tasks",
    "theory",
    "training",
    "truncated_bptt",
    "unroll",
    "watch",
    "zero_taps",
]
