"""Measures the cluster: `python -m experiments.comm cluster=local_2x2 write_to=conf/cluster/mine.yaml`.

For every level, latency (alpha) and inverse bandwidth (beta) of a message between two ranks, while all pairs of that
level are busy at once: each rank sends and receives one message at the same time (`batch_isend_irecv`, under gloo and
NCCL alike), so beta is that of a two-way exchange and holds the contention of the ranks that share a link. The level
`self` is a copy within a rank's own memory, all ranks copying at once. All levels and sizes take turns (1 2 3, then 2 3
1, ...), the slowest rank counts, then the median over repeats, and `moe.costs.fit_alpha_beta` fits the line. An
all-to-all over all ranks, measured in the same turns, stands beside what the fitted costs predict for it.

Writes comm.parquet (every timing) and cluster.yaml into outputs/<run id>/, and with `write_to=FILE` also there: a file
of conf/cluster, which other runs name as `cluster=mine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.bench_run import BenchRun
from experiments.cli import hydra_main
from experiments.comm_bench import CommRow
from experiments.comm_fits import CollectiveFit, collective_fits, level_costs, medians, rounded_cost
from experiments.config import COSMETIC, ClusterConfig, CommRunConfig, cluster_from
from experiments.launch import is_main_process
from experiments.measured_cluster import measure, read_rows, timings_of
from experiments.results import atomic_write
from experiments.split import SPLIT_KEYS
from moe.costs import AlphaBeta, slowest_pair_s
from moe.errors import ConfigError, Problem
from moe.topology import Cluster

LOW_R2 = 0.8


@hydra_main("comm")
def main(config: CommRunConfig, overrides: list[str]) -> None:
    """Measure unless that is done already, write the cluster's files, print the tables."""
    run = BenchRun(config, overrides)
    _check_target(config, run, timings_of(run))
    rows = measure(config, overrides)
    if is_main_process():
        _report(config, run, rows)


def _report(config: CommRunConfig, run: BenchRun, rows: list[CommRow]) -> None:
    cluster, costs = cluster_from(config.cluster), level_costs(rows)
    fits = collective_fits(rows, cluster)
    own = cluster_yaml(config.cluster, config.cluster.name, costs, run, fits)
    written = [(run.dir.path / "cluster.yaml", own)]
    if config.write_to is not None:
        target = Path(config.write_to).expanduser()
        written.append((target, cluster_yaml(config.cluster, target.stem, costs, run, fits)))
    for path, text in written:
        with atomic_write(path) as file:
            file.write(text.encode())
    print(format_costs(cluster, costs), end="")
    print(format_check(rows, costs), end="")
    print(format_collectives(cluster, fits), end="")
    print(f"results: {', '.join(str(path) for path in (run.dir.path, *(path for path, _ in written[1:])))}", flush=True)


def format_costs(cluster: Cluster, costs: dict[str, AlphaBeta]) -> str:
    """The table of levels, and a warning about fits that explain little.

    A level of one group of the level below has no pairs, and dashes.
    """
    lines = [f"{'level':<12}{'ranks':>6}{'alpha us':>12}{'beta ns/byte':>15}{'GB/s':>10}{'r2':>9}"]
    for index, level in enumerate(cluster.levels):
        line = f"{level.name:<12}{cluster.group_size(index):>6}"
        cost = costs.get(level.name)
        if cost is None:
            lines.append(f"{line}{'-':>12}{'-':>15}{'-':>10}{'-':>9}")
            continue
        lines.append(f"{line}{_cost_columns(cost)}")
    lines += _poor([level for level, cost in costs.items() if cost.r2 is not None and cost.r2 < LOW_R2])
    return "\n".join(lines) + "\n"


def format_collectives(cluster: Cluster, fits: Sequence[CollectiveFit]) -> str:
    """The table of collectives, and a warning about fits that explain little; a sentence where they were not measured,
    empty for one rank."""
    if not fits:
        told = "collectives: not fitted. Each needs two sizes_bytes above its number of ranks; timings of an earlier "
        return f"{told}version lack them, force=true measures again\n" if cluster.crossed_levels else ""
    lines = [
        "collectives: even all-to-alls by the bytes that a rank sends in all, all groups at once:",
        f"{'collective':<12}{'level':<12}{'ranks':>6}{'alpha us':>12}{'beta ns/byte':>15}{'GB/s':>10}{'r2':>9}",
    ]
    for collective, cost in fits:
        name = f"{collective.name:<12}{collective.level or 'all':<12}{collective.num_ranks:>6}"
        lines.append(f"{name}{_cost_columns(cost)}")
    lines += _poor([collective.name for collective, cost in fits if cost.r2 is not None and cost.r2 < LOW_R2])
    return "\n".join(lines) + "\n"


def _cost_columns(cost: AlphaBeta) -> str:
    beta = cost.beta_s_per_byte
    return f"{cost.alpha_s * 1e6:>12.2f}{beta * 1e9:>15.4g}{1e-9 / beta:>10.4g}{_rounded(cost.r2):>9}"


def _poor(names: list[str]) -> list[str]:
    """A warning about fits that explain little, if there are any."""
    fix = "more repeats against noise, sizes_bytes nearer to those in use against a bend (caches, a shaper's burst)"
    return [f"a line fits badly (r2 below {LOW_R2}): {', '.join(names)}; {fix}"] if names else []


def format_check(rows: Sequence[CommRow], costs: dict[str, AlphaBeta]) -> str:
    """The all-to-all over all ranks, measured and as the slowest pair predicts it; empty for one rank."""
    times = medians(rows, "all_to_all", "")
    if not times:
        return ""
    crossed = [cost for level, cost in costs.items() if level != "self"]
    lines = [
        "check: an even all-to-all over all ranks. The slowest pair leaves out that a rank's messages share its link:",
        f"{'bytes a pair':>14}{'measured us':>14}{'slowest pair us':>18}{'ratio':>8}",
    ]
    for size, seconds in times.items():
        predicted = slowest_pair_s(crossed, size)
        lines.append(f"{size:>14}{seconds * 1e6:>14.1f}{predicted * 1e6:>18.1f}{seconds / predicted:>8.2f}")
    return "\n".join(lines) + "\n"


def cluster_yaml(
    cluster: ClusterConfig, name: str, costs: dict[str, AlphaBeta], run: BenchRun, fits: Sequence[CollectiveFit] = ()
) -> str:
    """A file of conf/cluster: the cluster that was measured, with the costs of its levels and collectives.

    Args:
        cluster: as it was measured, its levels and device settled.
        name: of the new file.
        costs: of its levels; one that is missing keeps null.
        run: says in the header when, by which command and on what it was measured.
        fits: of its collectives, all or none.
    """
    content = {**cluster.model_dump(mode="json"), "name": name, "local_copy": rounded_cost(costs["self"])}
    content["levels"] = [{**level, **rounded_cost(costs.get(level["name"]))} for level in content["levels"]]
    for key in ("collectives", "profile"):  # of an earlier measurement, and that it was one
        content.pop(key, None)
    if cluster.launch != "split":
        content = {key: value for key, value in content.items() if key not in SPLIT_KEYS}
    lines = _header(run)
    for key, value in content.items():
        if key == "levels":
            lines += ["levels:", *(f"  - {_flow(level)}{_r2(costs.get(level['name']))}" for level in value)]
        elif key == "local_copy":
            lines += [f"local_copy: {_flow(value)}{_r2(costs['self'])}", *_collective_lines(fits)]
        else:
            lines += yaml.safe_dump({key: value}, width=10_000, allow_unicode=True).splitlines()
    ClusterConfig.model_validate(yaml.safe_load("\n".join(lines)))
    return "\n".join(lines) + "\n"


def _collective_lines(fits: Sequence[CollectiveFit]) -> list[str]:
    """The key `collectives`, with a comment on every fit; nothing without any."""
    if not fits:
        return []
    (_, standard), *others = fits
    lines = ["collectives:  # even all-to-alls by the bytes that a rank sends in all"]
    lines.append(f"  standard: {_flow(rounded_cost(standard))}{_r2(standard)}")
    for pattern in ("inter", "intra"):
        own = [(collective, cost) for collective, cost in others if collective.pattern == pattern]
        lines.append(f"  {pattern}:" + " []" * (not own))
        lines += [f"    - {_flow(rounded_cost(cost))}{_r2(cost)}, level {collective.level}" for collective, cost in own]
    return lines


def _header(run: BenchRun) -> list[str]:
    manifest = run.dir.read_manifest()
    hardware = manifest["hardware"]
    gpus = [f"{hardware['gpus'].count(gpu)} x {gpu}" for gpu in dict.fromkeys(hardware["gpus"])]
    given = [text for text in run.overrides if text.partition("=")[0].lstrip("+") not in COSMETIC]
    machine = [hardware["system"], hardware["cpu"], f"{hardware['cores']} cores", *gpus]
    return [
        f"# Measured on {manifest['started']} by: {' '.join(['python -m experiments.comm', *given])}",
        f"# Rank 0's machine: {', '.join(machine)}; torch {manifest['versions']['torch']}",
        "# Costs of one message while all pairs of its level exchange at once, both ways, so contention is in beta.",
    ]


def _flow(mapping: dict[str, Any]) -> str:
    """A mapping on one line, as the files of conf/ have it."""
    return str(
        yaml.safe_dump(mapping, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    ).strip()


def _r2(cost: AlphaBeta | None) -> str:
    return "  # no pairs to measure" if cost is None else f"  # r2 {_rounded(cost.r2)}"


def _rounded(r2: float | None) -> str:
    assert r2 is not None, "a cost that was not fitted"
    return f"{round(r2, 4) + 0.0:.4f}"  # no -0.0000


def _check_target(config: CommRunConfig, run: BenchRun, table: Path) -> None:
    """Raise ConfigError for a `write_to` that can't be written, before anything is measured."""
    if config.write_to is None:
        return
    target = Path(config.write_to).expanduser()
    rule, fix = "", "name a new file, for example write_to=conf/cluster/mine.yaml"
    if target.suffix != ".yaml":
        rule = "is the file of a cluster, and its name ends in .yaml"
    elif not target.parent.is_dir():
        rule = f"there is no folder {target.parent.absolute()}"
        fix = f"make it, or {fix}"
    elif target.exists() and not config.force and not _is_ours(target, config, run, table):
        rule = "exists, and is not replaced unasked"
        fix = f"{fix}, or set force=true to measure again and replace it"
    if rule:
        raise ConfigError(Problem("write_to", config.write_to, rule, fix))


def _is_ours(target: Path, config: CommRunConfig, run: BenchRun, table: Path) -> bool:
    """Whether the file is just what this run, complete already, would write."""
    status = run.dir.status()
    if status is None or status.status != "done" or not table.exists():
        return False
    rows = read_rows(table)
    fits = collective_fits(rows, cluster_from(config.cluster))
    text = cluster_yaml(config.cluster, target.stem, level_costs(rows), run, fits)
    return target.is_file() and target.read_bytes() == text.encode()


if __name__ == "__main__":
    main()
