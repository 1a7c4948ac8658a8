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
# # What `make compare` leaves
#
# One comparison: several systems that trained on the same text from the same weights, and were then timed in turn.
# This notebook reads its files and shows what each table and figure says. Nothing is trained here, and torch is not
# needed.
#
# `results` is a folder of results: empty for the published ones, `outputs` (as seen from where the kernel runs) for
# your own. `name` picks the comparison, such as `netns_2x2_ta_moe`; empty for the first.

# %%
from analysis.comparison import compare
from analysis.figures.found import look_into
from analysis.inline import folder_of, picture
from analysis.plots.bytes import bytes_figure
from analysis.plots.loss import loss_figure
from analysis.plots.stages import stages_figure
from analysis.plots.throughput import throughput_figure
from analysis.summary import summarise
from analysis.tables import READING, odd_rows, people_table

# %% tags=["parameters"]
results = ""
name = "netns_2x2_ta_moe"

# %% [markdown]
# ## What is there
#
# Everything under the folder is looked at. What is of no use, such as a run that still writes or was interrupted, is
# told with its reason and left out.

# %%
root = folder_of(results)
found = look_into([root])
print("\n".join([*found.skipped, *found.refused]) or "nothing was left out")

# %%
names = [one.name for one in found.comparisons]
chosen = found.comparisons[names.index(name)] if name else found.comparisons[0]
comparison = compare(chosen.run_dirs, chosen.samples_dir, chosen.baseline)
summary = summarise(comparison)
print(f"{chosen.name}, {comparison.kind} on {chosen.machine}; the others are {', '.join(names)}")

# %% [markdown]
# ## The table
#
# A row a system. *upstream* is its authors' own package, *native* a re-statement in this suite. A ratio stands with
# its 95 % bootstrap interval; where that holds 1, the two can't be told apart.

# %%
people_table(summary)

# %%
print("\n".join([*READING, "", *odd_rows(summary), *comparison.notes]))

# %% [markdown]
# ## Do they learn alike?
#
# Systems that compute the same function lie on one curve, and below, their distance to the reference is rounding. A
# system with a loss term or drops of its own parts from it, and should.

# %%
picture(loss_figure, comparison) if comparison.runs else "The runs of this comparison were not kept."

# %% [markdown]
# ## How fast are they?
#
# Rounds were interleaved, so that a busy machine slows all systems alike; each dot is one round's ratio to the
# baseline.

# %%
picture(throughput_figure, comparison, summary)

# %% [markdown]
# ## Where do the time and the bytes go?
#
# Bytes are counted, not timed: they repeat exactly, and explain a difference in time where a link is the bottleneck.
# Stages are timed each on its own; some gates also lay out slots, so compare gate and dispatch together.

# %%
picture(bytes_figure, comparison, summary)

# %%
picture(stages_figure, comparison, summary)
