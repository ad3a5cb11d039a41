"""First weights that mmengine's ``init_cfg`` has no name for, and where ReLU is missing."""
from mmengine.model.weight_init import BaseInit, update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn


@WEIGHT_INITIALIZERS.register_module('TorchConv')
class TorchConvInit(BaseInit):
    """Weights and biases of convolutions as torch draws them; the authors' in private training.

    Uniform within 1 / sqrt(fan in), both.

    Args:
        layer: Type of the layers by name, or a list of them, e.g. ``'KNConv2d'``.
    """

    def __init__(self, layer: str | list[str]) -> None:
        super().__init__(layer=layer)

    def __call__(self, module: nn.Module) -> None:
        def init(m: nn.Module) -> None:
            if any(kind.__name__ in self.layer for kind in type(m).__mro__):
                nn.Conv2d.reset_parameters(m)

        module.apply(init)
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())

    def _get_init_info(self) -> str:
        return f'{type(self).__name__}: weights and biases as torch draws them'


def spread_biases(module: nn.Module) -> None:
    """Draws the biases of convolutions as torch does, uniform within 1 / sqrt(fan in).

    Those whose weights are zero keep a bias of zero: their residual blocks start as identity.

    Where an image is black, biases of zero keep every layer at exactly zero. Such windows have no
    variance, so that the gradient grows by 1 / sqrt(eps), about 300, in each layer. ReLU stops it
    there, its slope at zero is zero; that of Mish is 0.6. The authors' networks start with such
    biases too.
    """
    for m in module.modules():
        if isinstance(m, nn.Conv2d) and m.bias is not None and m.weight.any():
            bound = m.weight[0].numel() ** -0.5
            nn.init.uniform_(m.bias, -bound, bound)
