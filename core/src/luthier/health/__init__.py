"""Health: problems of a run, seen early and named: non-finite numbers, spikes, parameters that no gradient reaches."""
