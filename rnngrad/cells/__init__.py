"""Recurrent cells, one file each: equations, params, state, preactivate, update."""

from rnngrad.cells.coupled_lstm import CoupledLSTMGates, CoupledLSTMParams, coupled_lstm
from rnngrad.cells.gru import GRUGates, GRUParams, GRUState, gru
from rnngrad.cells.indrnn import IndRNNParams, indrnn
from rnngrad.cells.lru import LRUGates, LRUParams, LRUState, eigenvalues, lru
from rnngrad.cells.lstm import LSTMGates, LSTMParams, LSTMState, lstm
from rnngrad.cells.map import map_cell
from rnngrad.cells.min_gru import MinGRUGates, MinGRUParams, min_gru
from rnngrad.cells.min_lstm import MinLSTMGates, MinLSTMParams, min_lstm
from rnngrad.cells.peephole_lstm import PeepholeLSTMParams, peephole_lstm
from rnngrad.cells.stack import stack
from rnngrad.cells.vanilla import VanillaGates, VanillaParams, VanillaState, vanilla

__all__ = [
    "CoupledLSTMGates",
    "CoupledLSTMParams",
    "GRUGates",
    "GRUParams",
    "GRUState",
    "IndRNNParams",
    "LRUGates",
    "LRUParams",
    "LRUState",
    "LSTMGates",
    "LSTMParams",
    "LSTMState",
    "MinGRUGates",
    "MinGRUParams",
    "MinLSTMGates",
    "MinLSTMParams",
    "PeepholeLSTMParams",
    "VanillaGates",
    "VanillaParams",
    "VanillaState",
    "coupled_lstm",
    "eigenvalues",
    "gru",
    "indrnn",
    "lru",
    "lstm",
    "map_cell",
    "min_gru",
    "min_lstm",
    "peephole_lstm",
    "stack",
    "vanilla",
]
