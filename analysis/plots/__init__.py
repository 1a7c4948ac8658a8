"""The figures of a comparison, one file each, drawn from a `Comparison` and its summary and returned unsaved."""
