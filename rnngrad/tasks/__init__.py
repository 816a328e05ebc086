"""Tasks: where sequences come from."""

from rnngrad.tasks.adding import adding
from rnngrad.tasks.agreement import (
    AGREEMENT_VOCABULARY,
    AgreementSentences,
    agreement,
    agreement_sentences,
    agreement_words,
    nearest_noun_accuracy,
    shortest_distance,
)
from rnngrad.tasks.batches import Batch, Task
from rnngrad.tasks.copy_memory import copy_memory
from rnngrad.tasks.digits import digits
from rnngrad.tasks.temporal_order import temporal_order
from rnngrad.tasks.text import (
    Streams,
    Text,
    Tokens,
    cache_folder,
    encode,
    load_text,
    sequences,
    split,
    streams,
    tokenize,
)

__all__ = [
    "AGREEMENT_VOCABULARY",
    "AgreementSentences",
    "Batch",
    "Streams",
    "Task",
    "Text",
    "Tokens",
    "adding",
    "agreement",
    "agreement_sentences",
    "agreement_words",
    "cache_folder",
    "copy_memory",
    "digits",
    "encode",
    "load_text",
    "nearest_noun_accuracy",
    "sequences",
    "shortest_distance",
    "split",
    "streams",
    "temporal_order",
    "tokenize",
]
