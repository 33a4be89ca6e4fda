"""What the paper shows beside its training runs: figures 1a, 1b, 3b and 5.

Each analysis is a function that returns plain data for a JSON file: "analysis" (its name), its
settings, its curves. `bnrnn.report.analysis_figures` draws them.
"""
