"""The parent's part of a benchmark (experiments.layer, experiments.comm, the timing of experiments.compare): its
folder, its launch, its status."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from experiments import provenance
from experiments.config import AnyConfig, LayerRunConfig, RunConfig, cluster_from, run_id
from experiments.launch import RankFailure, is_main_process, run_ranks
from experiments.results import RunDir, now, write_table
from experiments.samples import SampleRow, footer_of
from moe.errors import SuiteError

OF_ONE_START = ("git", "started", "ended")
"""Keys of manifest.json in which a start may differ from the one that it goes on from; `sources_sha256` is the code."""


def _alike(part: Any) -> Any:
    """A part of a manifest as nodes of one kind have it: they differ in a few bytes of memory."""
    return {key: part[key] for key in part if key != "memory_bytes"} if isinstance(part, dict) else part


class BenchRun:
    """One benchmark run and its folder, outputs/<run id>/.

    Args:
        config: validated; says the cluster, the output folder and whether to run again what is complete.
        overrides: of the command line.
    """

    def __init__(self, config: AnyConfig, overrides: Sequence[str]) -> None:
        assert not isinstance(config, RunConfig), "training runs have experiments.cells"
        self.config, self.overrides = config, overrides
        self.dir = RunDir(Path(config.output_dir) / run_id(config))

    @property
    def samples_path(self) -> Path:
        """Every value of every round."""
        return self.dir.path / "samples.parquet"

    def must_run(self, force: bool) -> bool:
        """False, with a line that says so, when the run is complete already: done, and no system failed in it."""
        status = self.dir.status()
        complete = status is not None and status.status == "done" and not status.reason
        if complete and not force:
            if is_main_process():
                print(f"{self.dir.path} is complete (force=true runs it again)", flush=True)
            return False
        return True

    def launch(self, target: str, payload: dict[str, Any], *, timeout_s: float, keep: bool = False) -> Any:
        """Run `target` in every rank of the cluster, with `payload` and the config; keep the status. Collective.

        Args:
            target: `package.module:function` of (payload, rank_info).
            payload: JSON-able; `config` and `folder` are added.
            timeout_s: longest wait of one collective.
            keep: go on from the journal of an earlier start, if that had the same code and machine.

        Returns:
            Rank 0's value; None on a joined rank that is not rank 0.
        """
        config = self.config
        if is_main_process():
            self._prepare(keep)
        assert config.cluster.levels is not None, "load settles the levels"
        try:
            value = run_ranks(
                target,
                {"config": config.model_dump(mode="json"), "folder": str(self.dir.path), **payload},
                num_ranks=config.cluster.world_size,
                ranks_per_node=config.cluster.levels[0].fanout,
                launch=config.cluster.launch,
                device="cuda" if config.cluster.device == "cuda" else "cpu",
                rate_mbit=config.cluster.rate_mbit,
                log_dir=self.dir.logs,
                timeout_s=timeout_s,
                env=config.cluster.variables,
            )
        except SuiteError as error:
            if is_main_process():
                self.dir.set_status(error.kind if isinstance(error, RankFailure) else "failed", str(error))
            raise
        if is_main_process():
            self.dir.write_manifest({**self.dir.read_manifest(), "ended": now()})
        return value

    def _prepare(self, keep: bool) -> None:
        """Make the folder, anew unless there is a journal to go on from; write config and manifest."""
        config, earlier = self.config, self.dir.read_manifest()
        cluster, seed = config.cluster.model_dump(mode="json"), getattr(config, "seed", 0)
        manifest = provenance.manifest(run_id(config), seed, cluster, started=now())
        manifest["sources_sha256"] = provenance.sources_sha256()
        begun = keep and self.dir.journal.exists()
        told = manifest.keys() - set(OF_ONE_START)
        changed = [key for key in manifest if key in told and _alike(manifest[key]) != _alike(earlier.get(key))]
        if begun and not changed:
            start = {key: earlier[key] for key in ("started", "git")}
            manifest["earlier_starts"] = [*earlier.get("earlier_starts", []), start]
            print(f"{self.dir.path}: what is measured is kept (force=true measures it again)", flush=True)
        else:
            if begun:
                print(f"{self.dir.path} was begun with other {', '.join(changed)}: it starts anew", flush=True)
            shutil.rmtree(self.dir.path, ignore_errors=True)
        self.dir.create(config.model_dump(mode="json"), list(self.overrides))
        self.dir.write_manifest(manifest)

    def write_samples(self, rows: Sequence[Sequence[Any]], known: Collection[str] = ()) -> None:
        """Write samples.parquet, then say done, and what failed, other than the systems whose failure was `known`."""
        self.write_table(rows)
        told = [row for row in map(SampleRow._make, rows) if row.metric == "status"]
        failed = {row.system: row.part for row in told if not (row.part.startswith("refused") or row.system in known)}
        self.dir.set_status("done", "; ".join(f"{system} {part}" for system, part in failed.items()))
        self.dir.journal.unlink(missing_ok=True)

    def write_table(self, rows: Sequence[Sequence[Any]], stopped: str = "") -> None:
        """Write samples.parquet, and no status; `stopped` says what of it is there after a stop."""
        shapes = self.config.shapes if isinstance(self.config, LayerRunConfig) else []
        sizes = {"shapes": {shape.name: shape.model_dump(exclude={"name"}) for shape in shapes}} if shapes else {}
        told = {"stopped": stopped} if stopped else {}
        footer = footer_of("measured", cluster_from(self.config.cluster), run_id=run_id(self.config), **sizes, **told)
        write_table(self.samples_path, SampleRow, rows, footer)
