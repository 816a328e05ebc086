"""``python -m rnngrad``, the same as the command ``rnngrad``: diagnose, init-report, doctor, cells."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for what should not happen, 2 for what the user can put right.

    Args:
      arguments: the words after ``rnngrad``; None for those of the process.

    >>> main(["cels"])
    2
    """
    try:
        from rnngrad.cli import commands
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("tyro", "rich"):
            raise
        sys.stderr.write(f'error: the command needs {missing}: pip install "rnngrad[cli]"\n')
        return 2
    return commands.main(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
