"""Tests that need GPUs: `make test-gpu`. CI has none, so they are not part of `make test`; results/ holds what they gave."""
