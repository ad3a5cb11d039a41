"""Differentially private training (DP-SGD) as a config change; needs the extra ``privacy``.

A config loads it beside the package: ``custom_imports=dict(imports=['mmseg_kn',
'mmseg_kn.privacy'])``. What it gives and what it costs: docs/privacy.md.

Source: M. Abadi, A. Chu, I. Goodfellow, H. B. McMahan, I. Mironov, K. Talwar, L. Zhang, "Deep
Learning with Differential Privacy", CCS 2016, https://arxiv.org/abs/1607.00133. Clipping, noise
and accounting are opacus's (https://arxiv.org/abs/2109.12298).
"""
try:
    import opacus  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != 'opacus':
        raise
    raise ImportError('mmseg_kn.privacy needs opacus, which is missing: '
                      'pip install "mmseg_kn[privacy]"') from None

from .distributed import MMDPDistributedDataParallel
from .grad_sample import GradSampler
from .hook import DPHook
from .loop import DPIterBasedTrainLoop
from .optim_wrapper import DPOptimWrapper
from .sampler import PoissonBatchSampler

__all__ = [
    'DPHook', 'DPIterBasedTrainLoop', 'DPOptimWrapper', 'GradSampler',
    'MMDPDistributedDataParallel', 'PoissonBatchSampler'
]
