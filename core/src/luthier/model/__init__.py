"""The model that is trained: loading, the policy over it, attention, head, operations and recomputation."""
