import torch

# The tests are small: threads would only contend where several processes share the cores.
torch.set_num_threads(1)
