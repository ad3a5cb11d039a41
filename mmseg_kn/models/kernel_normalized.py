"""Builds a segmentor of a config and converts it to kernel normalization."""
import inspect

from mmseg.registry import MODELS
from torch import nn

from .kernelize import kernelize


def model_and_options(model: dict, **settings) -> tuple[dict, dict]:
    """The config of the model, and the arguments of :func:`kernelize`, of a KernelNormalized.

    Other settings are the model's, since mmseg's and mmengine's functions put some there:
    ``init_model`` sets ``pretrained``, the Runner hands over a ``data_preprocessor`` for a model
    that names none.
    """
    arguments = inspect.signature(kernelize).parameters
    options = {name: settings.pop(name) for name in arguments if name in settings}
    if model.get('data_preprocessor') is not None:
        settings.pop('data_preprocessor', None)
    return dict(model, **settings), options


@MODELS.register_module()
def KernelNormalized(model: dict, **settings) -> nn.Module:
    """The model of a config with kernel normalization in place of BatchNorm.

    In a config over any other::

        model = dict(_delete_=True, type='KernelNormalized', model={{_base_.model}})

    The weights that ``init_cfg`` or ``pretrained`` name are loaded after the conversion. Those of
    a BatchNorm network give their convolutions only, see :func:`kernelize`.

    Args:
        model: The config of the model.
        settings: Arguments of :func:`kernelize`, as ``dropout_p``; others replace the model's.
    """
    model, options = model_and_options(model, **settings)
    return kernelize(MODELS.build(model), **options)
