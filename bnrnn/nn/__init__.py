"""The modules: batch-normalised LSTMs and models built from them."""
