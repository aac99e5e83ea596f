"""Health: what goes wrong in a run, seen early and named: non-finite numbers, spikes, gradients that reach nobody."""
