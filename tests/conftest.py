import torch

import mmseg_kn  # noqa: F401 (before any test imports mmseg.models: it lets that import)

# The tests are small: threads would only contend where several processes share the cores.
torch.set_num_threads(1)
