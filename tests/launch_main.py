"""A parent process of its own: `python -m tests.launch_main '<arguments of run_ranks as JSON>'` prints the outcome."""

from __future__ import annotations

import json
import sys
from typing import Any

from experiments.launch import is_main_process, run_ranks
from moe.errors import SuiteError


def main() -> None:
    """Run twice when asked to (`"times": 2`), and print one line of JSON from the main process."""
    arguments = json.loads(sys.argv[1])
    times = arguments.pop("times", 1)
    outcome: dict[str, Any]
    try:
        outcome = {"values": [run_ranks(**arguments) for _ in range(times)]}
    except SuiteError as error:
        outcome = {"error": type(error).__name__, "kind": getattr(error, "kind", ""), "message": str(error)}
    if is_main_process():
        print("outcome", json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
