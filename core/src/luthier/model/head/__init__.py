"""The policy's head: log-probabilities of labels and their gradients, without the logits of a whole batch."""
