"""Code shared by all figures, and the figure of a reader's attention."""
