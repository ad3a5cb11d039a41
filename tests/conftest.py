import os

import pytest
import torch
from mmengine.registry import DefaultScope

if not torch.cuda.is_available():  # triton's interpreter runs the kernels on the CPU
    os.environ.setdefault('TRITON_INTERPRET', '1')

import mmseg_kn  # noqa: E402, F401 (before any test imports mmseg.models: it lets that import)

# The tests are small: threads would only contend where several processes share the cores.
torch.set_num_threads(1)


@pytest.fixture(scope='module', autouse=True)
def own_default_scope():
    """A Runner leaves its default scope behind, and the next file's builds would look there."""
    before = DefaultScope._instance_dict.copy()
    yield
    DefaultScope._instance_dict = before


@pytest.fixture(scope='module', autouse=True)
def no_checkpoints_left(tmp_path_factory):
    """Else a run piles up 4 GB. Folders stay: mmengine's visualizer writes to its first one."""
    yield
    for path in tmp_path_factory.getbasetemp().rglob('*.pth'):
        if path.is_file():  # a sharded one is a folder
            path.unlink()


@pytest.fixture(scope='module')
def full_float32():
    """GPUs would round what is compared in float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
