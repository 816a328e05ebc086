"""rnngrad: how far back a recurrent network's gradient reaches, along which paths, and why it fades."""

from rnngrad import cells, initializers, logscaled, tasks
from rnngrad.cells.map import map_cell
from rnngrad.jacobians import gate_names, jacobian_chain, prefix_products, step_jacobians
from rnngrad.logscaled import LogScaled
from rnngrad.paths import GradientPaths, gradient_paths
from rnngrad.retention import (
    Certificate,
    RetentionCurve,
    certificate,
    decay_rate,
    half_life,
    naive_retention,
    retention,
)
from rnngrad.types import Cell, Trajectory
from rnngrad.unroll import unroll

__version__ = "0.1.0"

__all__ = [
    "Cell",
    "Certificate",
    "GradientPaths",
    "LogScaled",
    "RetentionCurve",
    "Trajectory",
    "cells",
    "certificate",
    "decay_rate",
    "gate_names",
    "gradient_paths",
    "half_life",
    "initializers",
    "jacobian_chain",
    "logscaled",
    "map_cell",
    "naive_retention",
    "prefix_products",
    "retention",
    "step_jacobians",
    "tasks",
    "unroll",
]
