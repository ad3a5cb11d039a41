"""What every conversion of weights checks before it renames them: all of a file fits, or none."""
from collections.abc import Collection, Mapping

import torch
from torch import Tensor


def few(keys: list) -> str:
    """The first of some keys, for a message."""
    return ', '.join(map(str, keys[:10])) + (', ...' if len(keys) > 10 else '')


def check_weights(state_dict: Mapping[str, Tensor], names: Collection[str], network: str) -> None:
    """Refuses weights that are not exactly those of a network.

    Args:
        state_dict: The weights.
        names: The names that they must have.
        network: What they look like, for the message.

    Raises:
        ValueError: A name is missing or unknown, or a value is not a dense tensor of finite
            floating-point numbers.
    """
    missing = [name for name in names if name not in state_dict]
    unknown = [str(name) for name in state_dict if name not in names]
    if missing or unknown:
        reasons = [f'{what} keys: {few(keys)}'
                   for what, keys in (('missing', missing), ('unknown', unknown)) if keys]
        raise ValueError(f'the weights look like {network}, but have ' + '; '.join(reasons))
    for name, value in state_dict.items():
        if not is_plain(value):
            raise ValueError(f'{name} must be a dense tensor of finite floating-point numbers')


def check_shapes(state_dict: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]],
                 network: str) -> None:
    """Refuses weights of another shape than ``shapes`` says, by the same names."""
    for name, shape in shapes.items():
        if state_dict[name].shape != shape:
            raise ValueError(f'{name} of {network} must have the shape {tuple(shape)}, got '
                             f'{tuple(state_dict[name].shape)}')


def is_plain(value: object) -> bool:
    """Whether a module can load it, and what it loads is what the file says."""
    return (isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested
            and not value.is_quantized and value.device.type != 'meta'
            and value.is_floating_point() and bool(value.isfinite().all()))


def copied(value: Tensor) -> Tensor:
    """A copy: a view would be saved with all of the memory that it is a view of."""
    return value.detach().clone(memory_format=torch.contiguous_format)
