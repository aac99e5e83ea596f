"""What a run has trained, used again: found (`weights_place`), opened (`open_weights`), measured (`weights_setup`, and
`evaluate_weights`, which the verb `evaluate` asks)."""
