"""Tells at the start of a training whether kernel normalization reaches all of the network."""
from mmcv.cnn import ConvModule
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from ..models.layers import KernelNorm2d, KNConv2d
from .wrappers import unwrap

# Modules whose convolutions are linear, by the names of their classes in mmseg and mmcv.
_LINEAR = ('FPN', 'NonLocal2d', 'DisentangledNonLocal2d')


def norm_faults(model: nn.Module) -> list[str]:
    """What is wrong with the normalization of a network that has kernel normalization.

    Only convolutions in mmcv's ConvModule are judged, because others, as the last layer of a
    head, may have their normalization elsewhere or need none. A network that mmseg_kn.kernelize
    converted has bare convolutions only where it had them before.
    """
    modules = dict(model.named_modules())
    if not any(isinstance(m, (KNConv2d, KernelNorm2d)) for m in modules.values()):
        return []
    found = {
        'BatchNorm is left, which mixes the images of a batch': [
            name for name, m in modules.items() if isinstance(m, nn.modules.batchnorm._BatchNorm)],
        'convolutions have no normalization': [] if hasattr(model, 'conversion') else [
            f'{name}.conv' for name, m in modules.items() if isinstance(m, ConvModule)
            and type(m.conv) is nn.Conv2d and not m.with_norm],
        "convolutions that are to be linear have activation='relu'": [
            f'{name}.{inner}' for name, m in modules.items() if type(m).__name__ in _LINEAR
            for inner, layer in m.named_modules()
            if isinstance(layer, KNConv2d) and layer.activation],
    }
    return [f'{fault}: {", ".join(names[:8])}'
            + f' and {len(names) - 8} more' * (len(names) > 8)
            for fault, names in found.items() if names]


@HOOKS.register_module()
class PartialNormHook(Hook):
    """Warns if a KernelNorm network is only partly normalized.

    ``conv_cfg`` and ``norm_cfg`` do not reach every layer of every model of mmseg, and a model
    whose layers were left out trains without a word. Models without kernel normalization are left
    alone.
    """

    def before_train(self, runner) -> None:
        if faults := norm_faults(unwrap(runner.model)):
            runner.logger.warning(
                f'the model is only partly kernel-normalized. {". ".join(faults)}. '
                "A config over the BatchNorm model's with model = dict(_delete_=True, "
                "type='KernelNormalized', model={{_base_.model}}) leaves no layer out: "
                'docs/any_model.md')
