"""The modules: batch-normalised LSTMs and what is made of them."""
