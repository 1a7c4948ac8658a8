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
# # HierMoE: a token once to each group, level by level
#
# HierMoE (arXiv 2508.09591) sends a token once to every group of ranks that has one of its experts, through as many
# levels of the cluster as its performance model finds best, and lets experts trade places. It pays where tokens
# choose many experts and links differ much.
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
names = ["tables", "netns_2x2_hiermoe_layer"]

# %% [markdown]
# ## What holds of the paper's claims

# %%
root = folder_of(results)
verdicts_of("HierMoE", root)

# %% [markdown]
# ## Figures
#
# - *table_ii* and *table_iv*: the share of duplicate copies, and speed-ups, modelled with the paper's own costs
#   beside what the paper prints. These bars are modelled, not measured.
# - *figure_9*: time of a collective against its bytes; the fitted line is alpha + beta * bytes.
# - *levels*: time of a dispatch over one, two, ... levels, modelled and measured; the model's choice is right where
#   its lowest point is the measured one.
# - *communication* and *step_time*: speed over `flat`, which sends each copy by itself, with bootstrap intervals.

# %%
gallery("hiermoe", look_into([root]), names)
