"""Memory: what a run will hold, what the device has, and what to do when it was not enough."""
