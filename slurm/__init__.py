"""Running the suite's experiments as jobs of Slurm."""
