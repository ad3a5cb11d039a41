import os

import torch

if not torch.cuda.is_available():  # triton's interpreter runs the kernels on the CPU
    os.environ.setdefault('TRITON_INTERPRET', '1')

import mmseg_kn  # noqa: E402, F401 (before any test imports mmseg.models: it lets that import)

# The tests are small: threads would only contend where several processes share the cores.
torch.set_num_threads(1)
