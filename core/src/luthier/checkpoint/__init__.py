"""Checkpoint: what a resumed run needs. `constants` keeps frozen tensors once beside the checkpoints of a run."""
