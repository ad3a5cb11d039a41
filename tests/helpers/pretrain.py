"""mmpretrain beside any torch: what its tests need before they import it."""
import importlib
import os

import pytest
import torch

REQUIRED = 'MMPRETRAIN_REQUIRED' in os.environ
LIBRARIES = []  # a library lives as long as someone holds it


def import_mmpretrain():
    """mmpretrain, or the test is skipped where it or torchvision is not installed.

    ``make test-pretrain`` sets MMPRETRAIN_REQUIRED: there a test that cannot import it fails.
    mmpretrain imports torchvision, of which each build fits exactly one build of torch. Where they
    do not fit, its compiled operators are missing, and its import fails as it describes two of
    them to torch. To declare these is enough: classification uses none.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        if REQUIRED:
            raise
        pytest.skip('torchvision is not installed')
    except RuntimeError:  # its operators do not exist
        library = torch.library.Library('torchvision', 'DEF')
        for name in ('nms', 'qnms'):
            library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        LIBRARIES.append(library)
    return importlib.import_module('mmpretrain') if REQUIRED else pytest.importorskip('mmpretrain')
