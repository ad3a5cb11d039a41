"""Activations by name, and what keeps a network's weights from one with another activation.

Their private networks the authors train with Mish. Two networks that differ in the activation
alone have the same weights by name and shape; to load one's into the other would go without a
word, and compute something else. So a network whose activation is not ReLU has its name among its
weights, as bytes in a buffer ``activation_name``.
"""
import torch
from torch import Tensor, nn

KEY = 'activation_name'
# torch's that act on each element alone, by themselves, and have no weights.
_KINDS = {name.lower(): getattr(nn, name) for name in (
    'CELU', 'ELU', 'GELU', 'Hardshrink', 'Hardsigmoid', 'Hardswish', 'Hardtanh', 'LeakyReLU',
    'LogSigmoid', 'Mish', 'ReLU', 'ReLU6', 'SELU', 'SiLU', 'Sigmoid', 'Softplus', 'Softshrink',
    'Softsign', 'Tanh', 'Tanhshrink')}


def activation_name(name: str) -> str:
    """The one way of writing an activation's name: ``'Leaky_ReLU'`` -> ``'leakyrelu'``.

    Raises:
        ValueError: torch has no such activation, or it does not act on each element alone.
    """
    plain = name.lower().replace('_', '') if isinstance(name, str) else name
    if plain not in _KINDS:
        raise ValueError('activation must name one of torch.nn that acts on each element alone: '
                         f'{", ".join(_KINDS)}; got {name!r}')
    return plain


def build_activation(name: str) -> tuple[nn.Module, str | None]:
    """What a network calls, and what its layers do themselves: of the two, one is to do.

    Returns:
        The activation with torch's defaults, and None; for ReLU, which the layers apply without
        keeping another map for backward, ``nn.Identity()`` and ``'relu'``.
    """
    return (nn.Identity(), 'relu') if name == 'relu' else (_KINDS[name](), None)


def name_as_tensor(name: str) -> Tensor:
    """What a network keeps under ``activation_name``, and a converter writes."""
    return torch.tensor(list(name.encode()), dtype=torch.uint8)


def activation_of(state_dict: dict[str, Tensor]) -> str:
    """The activation that weights were trained with; those of ReLU networks do not say."""
    value = state_dict.get(KEY)
    if value is None:
        return 'relu'
    return ''.join(chr(c) if 32 <= c < 127 else '?' for c in value.flatten().tolist()[:40])
