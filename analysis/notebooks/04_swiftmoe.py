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
# # SwiftMoE: replicas that follow popularity
#
# SwiftMoE (SYMI, arXiv 2504.19925) gives popular experts more slots in every iteration, over an optimizer that is
# sharded evenly, so that moving a replica moves no optimizer state. More tokens survive at a fixed capacity, and a
# target loss is reached sooner.
#
# `results` is a folder of results, empty for the published ones; `names` are the comparisons to draw, empty for all.

# %%
import pandas as pd

from analysis.figures.found import look_into
from analysis.inline import folder_of, verdicts_of
from analysis.report.gallery import gallery

pd.set_option("display.max_colwidth", None)

# %% tags=["parameters"]
results = ""
names: list[str] = []

# %% [markdown]
# ## What holds of the paper's claims

# %%
root = folder_of(results)
verdicts_of("SwiftMoE", root)

# %% [markdown]
# ## Figures
#
# - *replicas*: an expert's popularity against its share of the slots; SwiftMoE follows one iteration late, FlexMoE
#   every 10, 50 or 100 steps, static replicas never.
# - *survival*: the share of copies that found a slot.
# - *target*: loss against steps and time, and when it reaches the target that was stated before the runs. A run that
#   never got there counts with the steps that it had.
# - *latency*: the parts of a step; what moving replicas costs stands by itself.
#
# Where nothing is drawn, no such comparison lies in the folder, and the command that makes one is named.

# %%
gallery("swiftmoe", look_into([root]), names)
