"""Several processes: which take part, how the step is spread over them, and how they are started."""
