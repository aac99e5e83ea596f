"""The schedule of a run: how many steps it has, and the learning rate of each."""
