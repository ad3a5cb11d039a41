"""Reads pickles of data sets without ever running code that they may carry.

A pickle may name any function, and pickle.load calls it. Here it may name numpy's arrays alone,
and each is read as the harmless stand-in that checkpoints have, too.
"""
import functools
import os
import pickle
from collections.abc import Callable
from pathlib import Path

from .safe_load import numpy_globals, plain, shown


class _PlainUnpickler(pickle.Unpickler):
    """Knows containers, numbers, text, bytes, and arrays of numbers."""

    def find_class(self, module: str, name: str) -> Callable:
        asked = f'{module}.{name}'
        if asked not in _globals():
            raise pickle.UnpicklingError(f'it asks for {shown(asked)}')
        return _globals()[asked]


@functools.cache
def _globals() -> dict[str, Callable]:
    return {name: stand_in for stand_in, name in numpy_globals()}


def load_pickle(path: str | Path) -> object:
    """What a pickle of plain values holds.

    Args:
        path: A file that Python 3 pickled, with arrays of numpy up to protocol 4, which is what
            pickle takes by default.

    Returns:
        Its containers, numbers, text, bytes and arrays of numbers.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds anything else.
    """
    with open(path, 'rb') as file:
        try:
            return plain(_PlainUnpickler(file).load())
        except pickle.UnpicklingError as error:
            reason = f'{path} was refused: a pickle of a data set must hold plain values ({error})'
        except Exception as error:  # a damaged pickle can raise anything
            if isinstance(error, OSError):
                raise
            reason = (f'{path} of {os.path.getsize(path)} bytes is damaged or not a pickle '
                      f'({type(error).__name__}: {shown(str(error))})')
    raise ValueError(f'{reason}; get it again from its publisher')
