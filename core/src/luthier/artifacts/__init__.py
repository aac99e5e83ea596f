"""Artifacts: the results of a run, saved, merged, verified, and loaded again."""
