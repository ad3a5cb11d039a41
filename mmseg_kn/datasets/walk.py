"""The data sets within wrappers such as RepeatDataset and ConcatDataset, built or in a config."""
import functools
from collections.abc import Iterator


def walk(dataset) -> Iterator:
    """Yields a data set, and then every data set that it wraps, at any depth.

    The wrappers of mmengine, mmseg and torch keep what they wrap as ``dataset`` or ``datasets``,
    and their configs have the same keys. The slice that mmengine's Runner takes of a data set for
    ``num_batch_per_epoch`` is not yielded, only what is in it.

    Args:
        dataset: A data set, or the dict that one is built from.
    """
    dataset = getattr(dataset, '_dataset', dataset)  # the slice keeps the whole data set there
    yield dataset
    for part in _wrapped(dataset):
        yield from walk(part)


def innermost(dataset) -> list:
    """Those data sets of :func:`walk` that wrap no other: they read the files."""
    return [part for part in walk(dataset) if not _wrapped(part)]


def _wrapped(dataset) -> list:
    get = dataset.get if isinstance(dataset, dict) else functools.partial(getattr, dataset)
    if parts := get('datasets', None):
        return list(parts)
    part = get('dataset', None)
    return [] if part is None else [part]
