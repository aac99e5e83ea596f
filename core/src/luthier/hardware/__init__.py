"""Hardware: the machine that a run uses, measured and described."""
