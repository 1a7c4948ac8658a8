"""The analysis side's one exception, and what a command line makes of it.

Not the suite's own family: this room imports no other and runs without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps


class ResultsError(Exception):
    """Result files that can't be compared or written, in a sentence that names the file, the rule and the fix."""


def exit_code(command: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """Makes a command line's function give its exit code: 0, or 2 with a sentence on stderr after a `ResultsError`.

    Args:
        command: takes the arguments, None for the process' own.
    """

    @wraps(command)
    def told(arguments: Sequence[str] | None = None) -> int:
        try:
            command(arguments)
        except ResultsError as error:
            print(error, file=sys.stderr)
            return 2
        return 0

    return told
