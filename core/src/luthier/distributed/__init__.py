"""Many processes: who takes part, how the step is spread over them, and how they are started."""
