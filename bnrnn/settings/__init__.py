"""The settings of a run: fields and checks, composition by Hydra, and comparison of runs."""
