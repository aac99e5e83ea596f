"""The head of a language model: log-probabilities of labels from hidden states, without the logits of a whole batch."""

from luthier_kernels.head.logprobs import score_labels

__all__ = ["score_labels"]
