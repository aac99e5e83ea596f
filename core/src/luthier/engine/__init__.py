"""The engine: policy, step, attention, loop, schedule, checkpoint, evaluation."""
