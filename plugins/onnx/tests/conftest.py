"""One thread: tiny tensors are many times slower with more. Nothing is fetched."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
