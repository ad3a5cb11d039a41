"""Batches as the privacy accounting assumes them: each item is in each with probability q."""
import math
import secrets
from collections.abc import Iterator

import numpy as np
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS

from ..datasets.walk import walk


@DATA_SAMPLERS.register_module()
class PoissonBatchSampler:
    """Endless batches of independently drawn items, empty ones included.

    Each item of the dataset is in each batch with probability q = batch_size * world_size / N,
    whatever else is in it; batch sizes vary accordingly. With several processes each draws from
    a fixed shard of its own, N the whole dataset. Draws come from a generator seeded by the
    operating system: who knows the batches has no use for the privacy that sampling gives.

    Args:
        sampler: Named by mmengine; only its ``dataset`` is used.
        batch_size: Items in a batch of this process on average, ``train_dataloader.batch_size``.

    Attributes:
        sample_rate: q.

    Raises:
        ValueError: The dataset is smaller than a batch of all processes.
    """

    def __init__(self, sampler, batch_size: int) -> None:
        rank, world_size = get_dist_info()
        num_items = len(sampler.dataset)
        self.sample_rate = batch_size * world_size / max(num_items, 1)
        if batch_size < 1 or self.sample_rate > 1:
            raise ValueError('batch_size must be at least 1 and, times the number of processes, '
                             f'at most the size of the dataset, {num_items}; got {batch_size} on '
                             f'{world_size} process(es). Lower train_dataloader.batch_size')
        self.batch_size = batch_size
        self.sampler = sampler
        self.shard = np.arange(rank, num_items, world_size)

    def __len__(self) -> int:
        """Batches in which an item comes once on average, what mmengine calls an epoch."""
        return math.ceil(1 / self.sample_rate)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.Generator(np.random.Philox(secrets.randbits(128)))
        while True:
            yield self.shard[generator.random(len(self.shard)) < self.sample_rate].tolist()


@FUNCTIONS.register_module()
def private_collate(data_batch: list[dict]) -> dict:
    """mmengine's ``pseudo_collate``, and no images for a batch without items."""
    return pseudo_collate(data_batch) if data_batch else dict(inputs=[], data_samples=[])


def split_batch(data_batch: dict, size: int | None) -> list[dict]:
    """``data_batch`` in nearly equal parts of at most ``size`` items; none if it is empty."""
    count = len(data_batch['inputs'])
    parts = math.ceil(count / (size or max(count, 1)))
    bounds = [round(i * count / max(parts, 1)) for i in range(parts + 1)]
    return [{key: value[a:b] for key, value in data_batch.items()}
            for a, b in zip(bounds, bounds[1:], strict=False)]


def forbid_refetch(dataset_cfg: dict) -> None:
    """Makes an image that cannot be used an error; mmengine would take another one for it."""
    for part in walk(dataset_cfg):
        if not isinstance(part, dict):  # built already; DPHook refuses it if it takes another
            continue
        kind = part['type']
        if isinstance(kind, str):
            with DATASETS.switch_scope_and_registry(None) as registry:  # mmseg's, as a rule
                kind = registry.get(kind)
        if isinstance(kind, type) and issubclass(kind, BaseDataset):
            part['max_refetch'] = 0
