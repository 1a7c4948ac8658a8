# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your cluster beside a published one
#
# Two folders of results, cell by cell: of your machine and of one that is published, of two commits, or of two
# versions of a package. `theirs` and `yours` are folders, or names of published ones. To make yours:
#
#     python -m experiments.comm cluster=auto write_to=conf/cluster/mine.yaml    # what your links cost
#     python -m experiments.layer cluster=mine experiment=native_layer           # layers, beside results/h100x2_layer
#     make compare                                                               # training, beside results/local_2x2

# %%
from pathlib import Path

import pandas as pd

from analysis.diff import READING, diff
from analysis.inline import folder_of
from analysis.load import load_run
from analysis.machine import machine_of
from analysis.pair_costs import levels_of
from analysis.report.runs import folders

pd.set_option("display.max_colwidth", None)

# %% tags=["parameters"]
theirs = "h100x2_layer"
yours = "h200x2"

# %% [markdown]
# ## On what each was measured

# %%
published = folder_of("")
sides = {name: published / name if (published / name).is_dir() else Path(name) for name in (theirs, yours)}
machines = {name: list(dict.fromkeys(map(machine_of, folders(side)))) for name, side in sides.items()}
pd.DataFrame([(name, machine) for name, all_of in machines.items() for machine in all_of], columns=["side", "machine"])

# %% [markdown]
# ## What their links cost
#
# alpha is the latency of a message, beta the time of a byte (its inverse is the bandwidth), as the cluster's file
# declares them; empty where nothing was measured or declared.

# %%
costs = [
    {"side": name, "cluster": run.declared("cluster"), "level": level.name, "ranks or groups": level.fanout}
    | {"alpha, ms": (level.alpha_s or float("nan")) * 1e3}
    | {"GB/s": 1e-9 / (level.beta_s_per_byte or float("nan"))}
    for name, side in sides.items()
    for run in (load_run(folder, metrics=()) for folder in folders(side))
    for level in levels_of(run)
]
pd.DataFrame(costs).drop_duplicates()

# %% [markdown]
# ## Cell by cell
#
# The ratio is yours over theirs: of a time, below 1 is faster; of tokens per second, above 1 is. Versions and
# hardware that differ are told below the table, as are cells that only one side has.

# %%
table, notes = diff(sides[theirs], sides[yours])
table[table["verdict"] == "differs"].set_index(["place", "system", "metric"])[
    ["a", "b", "unit", "ratio", "low", "high"]
]

# %%
print("\n".join([READING, "", *notes]))

# %% [markdown]
# ## Does the ranking hold?
#
# Where the same system is fastest on both sides, what was learned on theirs carries over to yours.

# %%
speed = table[table["metric"].isin(["step_time", "tokens_per_s"])].copy()
signs = speed["metric"].map({"step_time": 1, "tokens_per_s": -1})
for side in "ab":
    speed[f"rank in {side}"] = (speed[side] * signs).groupby(speed["place"]).rank().astype(int)
speed[["place", "system", "metric", "a", "b", "unit", "rank in a", "rank in b"]]
