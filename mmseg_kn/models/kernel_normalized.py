"""Builds a segmentor of a config and converts it to kernel normalization."""
from mmseg.registry import MODELS
from torch import nn

from .kernelize import kernelize


@MODELS.register_module()
def KernelNormalized(model: dict, data_preprocessor: dict | None = None, **kwargs) -> nn.Module:
    """The model of a config with kernel normalization in place of BatchNorm.

    In a config over any other::

        model = dict(_delete_=True, type='KernelNormalized', model={{_base_.model}})

    The weights that ``init_cfg`` or ``pretrained`` name are loaded after the conversion. Those of
    a BatchNorm network give their convolutions only, see :func:`kernelize`.

    Args:
        model: The config of the model.
        data_preprocessor: For the model if it names none. mmengine's Runner hands over the one at
            the top level of a config, as it does for every model.
        kwargs: Arguments of :func:`kernelize`, as ``dropout_p``.
    """
    if data_preprocessor is not None and model.get('data_preprocessor') is None:
        model = dict(model, data_preprocessor=data_preprocessor)
    return kernelize(MODELS.build(model), **kwargs)
