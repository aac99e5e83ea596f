"""Memory: what a run needs, found by rehearsing it on fake tensors."""
