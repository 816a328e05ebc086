"""Tasks: where sequences come from."""
