"""Tests that need GPUs: `make test-gpu`. CI has none, so `make test` leaves them out; results/ holds what they gave."""
