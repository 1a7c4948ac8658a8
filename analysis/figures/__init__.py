"""All figures and tables of the papers' comparisons, made again from result files: `python -m analysis.figures`."""
