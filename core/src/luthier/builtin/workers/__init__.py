"""Processes that train for a job: on this machine, for a desk of another one, and where a run was sent whole."""
