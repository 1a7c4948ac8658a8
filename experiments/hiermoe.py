"""HierMoE's numbers beside its paper's: `python -m experiments.hiermoe [--routing outputs/<run id>/routing.npz ...]`.

Writes tables.csv into outputs/hiermoe: table II (closed form), dispatch times of the paper's models, table IV's sweep,
the ablations of the peak and of the period between swaps, all modelled; table II from the routing of trained models,
measured; and the paper's own fits of figure 9. `python -m analysis.hiermoe outputs/hiermoe` draws them.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from analysis.errors import ResultsError, exit_code
from analysis.files import write_text
from methods.hiermoe_paper import (
    FIGURE_9,
    NUM_TOKENS,
    peak_rows,
    reference_rows,
    routed_table_ii_rows,
    table_ii_rows,
    table_iv_rows,
)
from methods.hiermoe_period import ITERATIONS, period_rows

COLUMNS = ["table", "quantity", "paper", "ours", "unit", "kind", "source"]
"""Of tables.csv: `paper` and `ours` are numbers, or empty; `kind` says how ours came to be."""


def routed_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Table II from what the gates of a run chose in its last step, all layers together.

    Args:
        path: routing.npz of a run.

    Raises:
        ResultsError: no such file, one without choices, or choices of other experts than it counts.
    """
    fix = "Fix: name the routing.npz of a finished run, such as outputs/<run id>/routing.npz."
    try:
        with np.load(path, allow_pickle=False) as file:
            ids_LTK, num_experts = file["sample_expert_ids"], int(file["dispatch_counts"].shape[-1])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ResultsError(f"{path}: holds no readable routing ({str(error)[:80]}). {fix}") from error
    if ids_LTK.ndim != 3 or not ids_LTK.size or not 0 <= ids_LTK.min() <= ids_LTK.max() < num_experts:
        raise ResultsError(
            f"{path}: sample_expert_ids must be [layers, tokens, choices] of experts 0 to {num_experts - 1}, and is "
            f"{list(ids_LTK.shape)}. {fix}"
        )
    rows = routed_table_ii_rows(torch.from_numpy(ids_LTK.astype(np.int64)), num_experts, path.absolute().parent.name)
    if not rows:
        raise ResultsError(
            f"{path}: its {num_experts} experts can't be cut into any of table II's groups. Fix: train with a multiple "
            "of 4 experts."
        )
    for row in rows:
        yield {"table": "II", **row, "kind": "measured routing"}


def figure_9_rows() -> Iterator[dict[str, Any]]:
    """The paper's own fits, for the figure: there is nothing of ours in them."""
    names = ["standard", *(f"{kind}-{i}" for kind in ("Inter", "Intra") for i in range(1, FIGURE_9.depth))]
    source = "Figure 9, fitted by its authors; units not verified"
    for name, cost in zip(names, (FIGURE_9.standard, *FIGURE_9.inter, *FIGURE_9.intra), strict=True):
        shared = {"table": "figure 9", "ours": None, "kind": "paper", "source": source}
        yield shared | {"quantity": f"alpha of {name}", "paper": 1e3 * cost.alpha_s, "unit": "ms"}
        yield shared | {"quantity": f"beta of {name}", "paper": 1e3 * cost.beta_s_per_byte, "unit": "ms/byte"}


def table_rows(
    routing: Sequence[Path] = (),
    num_tokens: int = NUM_TOKENS,
    seeds: Sequence[int] = (0, 1, 2),
    most_swaps: int = 32,
    iterations: int = ITERATIONS,
) -> Iterator[dict[str, Any]]:
    """All rows of tables.csv.

    Args:
        routing: files whose choices stand beside table II.
        num_tokens, seeds, most_swaps: see `methods.hiermoe_paper.reference_rows`.
        iterations: see `methods.hiermoe_period.period_rows`.

    Raises:
        ResultsError: see `routed_rows`.
    """
    measured = [row for path in routing for row in routed_rows(path)]  # first: a wrong file is told at once
    sizes: dict[str, Any] = {"num_tokens": num_tokens, "seeds": seeds, "most_swaps": most_swaps}
    yield from ({"table": "II", **row} for row in table_ii_rows())
    yield from measured
    yield from ({"table": "reference", **row} for row in reference_rows(**sizes))
    yield from ({"table": "IV", **row} for row in table_iv_rows(**sizes))
    if most_swaps:
        yield from ({"table": "peak", **row} for row in peak_rows(**sizes))
        yield from ({"table": "period", **row} for row in period_rows(num_tokens, seeds[:1], iterations))
    yield from figure_9_rows()


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is below {least}")
    return value


def _positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def _not_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.hiermoe", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/hiermoe"), help="folder (default: outputs/hiermoe)")
    parser.add_argument("--routing", type=Path, nargs="+", default=[], help="routing.npz of trained models")
    parser.add_argument("--tokens", type=_positive, default=NUM_TOKENS, help="of a rank (default: the paper's 1024)")
    parser.add_argument("--seeds", type=_positive, default=3, help="routings that are averaged (default: 3)")
    parser.add_argument("--swaps", type=_not_negative, default=32, help="at most; 0 leaves HierMoE out (default: 32)")
    parser.add_argument(
        "--iterations", type=_positive, default=ITERATIONS, help="of the periods between swaps (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    rows = table_rows(given.routing, given.tokens, range(given.seeds), given.swaps, given.iterations)
    table = pd.DataFrame(list(rows), columns=COLUMNS)
    write_text(given.out / "tables.csv", table.to_csv(index=False))
    print(f"written: {given.out}/tables.csv; draw it with python -m analysis.hiermoe {given.out}")


if __name__ == "__main__":
    sys.exit(main())
