"""A cell's entry point as one rank of its job: what `slurm.task` does once it can say where it hangs."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path

from experiments.cli import EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED, error_text
from experiments.config import SCHEMAS, AnyConfig, load
from experiments.failures import report_of, write_report
from experiments.launch import RankFailure, is_main_process
from moe.errors import ConfigError, Problem, SuiteError
from slurm.planning import folders_of
from slurm.records import Cell


def enter(folder: Path) -> None:
    """Run the entry point; what fails is a report in the cell's folder, and an exit code.

    Args:
        folder: of the cell.
    """
    cell = Cell.load(folder)
    os.chdir(cell.working_dir)
    code = EXIT_FAILED
    try:
        kind = next(kind for kind in SCHEMAS if kind == cell.kind)
        config = load(kind, cell.config)
        _check_plan(cell, config)
        entry_point = importlib.import_module(f"experiments.{kind}")
        inspect.unwrap(entry_point.main)(config, cell.overrides)
        return
    except RankFailure as error:  # the ranks have left their reports beside the run
        code = EXIT_INTERRUPTED if error.kind == "interrupted" else EXIT_FAILED
        _say(error)
    except SuiteError as error:
        code = EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED
        write_report(folder, report_of(int(os.environ.get("SLURM_PROCID", "0")), error))
        _say(error)
    except Exception as error:
        write_report(folder, report_of(int(os.environ.get("SLURM_PROCID", "0")), error))
        raise
    sys.exit(code)


def _check_plan(cell: Cell, config: AnyConfig) -> None:
    """What was planned is what is here: else results would stand under another run id than the sweep looks for."""
    if folders_of(config) == cell.folders:
        return
    levels = " x ".join(str(level.fanout) for level in config.cluster.levels or [])
    rule = f"was planned for {cell.shape}, and here are {levels} ranks on {config.cluster.device}"
    raise ConfigError(Problem("cluster", config.cluster.name, rule, "ask Slurm for what the nodes have"))


def _say(error: SuiteError) -> None:
    if is_main_process():
        print(error_text(error), file=sys.stderr, flush=True)
