"""One thread: tiny tensors are many times slower with more."""

import torch

torch.set_num_threads(1)
