"""Training: models of layers, one loop with checkpoints and logs, and the gradient-flow monitor."""

from rnngrad.training.checkpoints import (
    Checkpoints,
    ConfigChangedError,
    CorruptCheckpointError,
    ForeignCheckpointError,
    NotWritableError,
)
from rnngrad.training.data_parallel import FirstProcessError, UnevenBatchError, ask_first
from rnngrad.training.logs import ForeignLogError, Log, jsonl_log, read_jsonl, tensorboard_log, wandb_log
from rnngrad.training.loop import (
    Fitted,
    Metrics,
    NonFiniteLossError,
    Progress,
    TrainState,
    evaluator,
    fit,
    initial_state,
    train_step,
)
from rnngrad.training.model import LayerTaps, Model, ModelParams, Output, count_parameters, model, zero_taps
from rnngrad.training.monitor import Flow, LayerFlow, Monitor, gradient_flow

__all__ = [
    "Checkpoints",
    "ConfigChangedError",
    "CorruptCheckpointError",
    "FirstProcessError",
    "Fitted",
    "Flow",
    "ForeignCheckpointError",
    "ForeignLogError",
    "LayerFlow",
    "LayerTaps",
    "Log",
    "Metrics",
    "Model",
    "ModelParams",
    "Monitor",
    "NonFiniteLossError",
    "NotWritableError",
    "Output",
    "Progress",
    "TrainState",
    "UnevenBatchError",
    "ask_first",
    "count_parameters",
    "evaluator",
    "fit",
    "gradient_flow",
    "initial_state",
    "jsonl_log",
    "model",
    "read_jsonl",
    "tensorboard_log",
    "train_step",
    "wandb_log",
    "zero_taps",
]
