"""What holds for every test: no network, and no clock that can fail it."""

from __future__ import annotations

import os

from hypothesis import settings

# A test that would download something fails instead; set before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

# Hypothesis' default deadline of 200 ms is a timing assertion; on a busy machine it fails for no reason.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
