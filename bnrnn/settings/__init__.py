"""The settings of a run: their fields and checks, how Hydra composes them, and what makes two runs
the same run."""
