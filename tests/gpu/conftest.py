import os

import pytest
import torch


@pytest.fixture
def device():
    """The GPU; the CPU where REHEARSE_GPU is set, to see that the tests themselves run."""
    if torch.cuda.is_available():
        return torch.device('cuda')
    if os.environ.get('REHEARSE_GPU'):
        return torch.device('cpu')
    pytest.skip('needs a GPU')
