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
# # FSMoE: a schedule that overlaps links and experts
#
# FSMoE (ASPLOS 2025, arXiv 2501.10714) cuts a layer into chunks so that exchanges inside a node, between nodes and
# the experts overlap, and lets measured costs decide how many. Its tables and figures are *simulated* here from the
# costs that the paper prints; layers that were really run say *measured*.
#
# `results` is a folder of results, empty for the published ones; `names` are the sources to draw, empty for all.

# %%
import pandas as pd

from analysis.figures.found import look_into
from analysis.inline import folder_of, verdicts_of
from analysis.report.gallery import gallery

pd.set_option("display.max_colwidth", None)

# %% tags=["parameters"]
results = ""
names = ["simulated"]

# %% [markdown]
# ## What holds of the paper's claims
#
# A number that was fitted to the very one that is claimed is no evidence, and says so.

# %%
root = folder_of(results)
verdicts_of("FSMoE", root)

# %% [markdown]
# ## Figures
#
# - *table2*: times of the parts of a layer as the paper prints them.
# - *table5* and *contention*: mean speed-up of each schedule over Tutel's, ours beside the paper's, and how it
#   depends on how much the two kinds of links slow each other.
# - *fig5* to *fig8*: fitted costs, speed-ups by model, by length and number of GPUs, and with pipeline stages.

# %%
found = look_into([root])
gallery("fsmoe", found, names)

# %% [markdown]
# ## Where the simulation is furthest from the paper
#
# What was fitted to the paper's own number is left out.

# %%
tables = [pd.read_csv(path).assign(table=path.stem) for path in found.files["table5.csv"] + found.files["fig6.csv"]]
if tables:
    rows = pd.concat(tables).dropna(subset=["paper", "ours"])
    rows = rows[(rows["kind"] == "simulated") & (rows["unit"] == "x")]
    rows = rows.assign(error=rows["ours"] / rows["paper"] - 1).sort_values("error", key=abs, ascending=False)
rows.head(10) if tables else "No simulated table here: run `python -m experiments.simulate all`."
