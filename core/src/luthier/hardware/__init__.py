"""Hardware: the machine that a run meets, measured and described."""
