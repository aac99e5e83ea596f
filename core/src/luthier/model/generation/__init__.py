"""Generation: what a model is given to answer, and when its answer ends."""
