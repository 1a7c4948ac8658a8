"""Reads result files, computes statistics, draws figures. Imports neither torch nor any other room of the suite."""
