"""Artifacts: what a run leaves behind, saved, merged, verified, and loaded again."""
