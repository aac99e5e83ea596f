"""Models that stand beside the policy: found, checked and read once."""
