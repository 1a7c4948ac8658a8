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
# # TA-MoE: dispatch that knows what links cost
#
# TA-MoE (NeurIPS 2022, arXiv 2302.09915) adds a balance loss that weighs what a copy of a token costs on its way:
# gates learn to keep more tokens near. The paper's question is whether training gets faster and loses no accuracy.
#
# `results` is a folder of results, empty for the published ones; `names` are the comparisons to draw, empty for all.

# %%
import pandas as pd

from analysis.comparison import compare
from analysis.figures.found import look_into
from analysis.inline import folder_of, verdicts_of
from analysis.report.gallery import gallery
from analysis.topology import load_routings
from analysis.topology_table import model_table

pd.set_option("display.max_colwidth", None)

# %% tags=["parameters"]
results = ""
names = ["netns_2x2_ta_moe"]

# %% [markdown]
# ## What holds of the paper's claims
#
# Computed from the result files, never typed: read each with the hardware beside it, which is hardly ever the
# paper's.

# %%
root = folder_of(results)
verdicts_of("TA-MoE", root)

# %% [markdown]
# ## Figures
#
# - *dispatch*: where each rank's copies went at the end of training, beside the target that the cost model set.
#   Darker on the diagonal blocks means nearer.
# - *locality*: the share of copies inside a node against step: it should rise to the dashed target while a balanced
#   gate's stays at the dotted line.
# - *loss_time*: validation loss against steps, where TA-MoE may lose a little, and against time, where it should win.
# - *communication*: seconds of dispatch and combine beside those of computation.

# %%
found = look_into([root])
gallery("ta_moe", found, names)

# %% [markdown]
# ## The cost model beside the measurement
#
# An exchange takes as long as its slowest pair of ranks, alpha + beta * bytes. An error far from 0 says that
# something else than the links is the bottleneck, such as ranks that wait for one another on few cores.

# %%
own = [one for one in found.comparisons if "ta_moe" in one.methods and (not names or one.name in names)]
comparisons = [compare(one.run_dirs, one.samples_dir, one.baseline) for one in own]
tables = [model_table(comparison, load_routings(comparison)[0]) for comparison in comparisons]
tables[0].set_index("system").T if tables else "No run of TA-MoE here."
