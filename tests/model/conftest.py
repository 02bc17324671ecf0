"""One thread for tiny models: two that share cores with other processes wait for each other."""

import torch

torch.set_num_threads(1)
