"""What every figure of the project shares, and the picture of a reader's attention."""
