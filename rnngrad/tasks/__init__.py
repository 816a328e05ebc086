"""Tasks: where sequences come from."""

from rnngrad.tasks.text import Text, Tokens, load_text, sequences, tokenize

__all__ = ["Text", "Tokens", "load_text", "sequences", "tokenize"]
