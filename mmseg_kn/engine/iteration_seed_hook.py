"""Seeds each iteration by its number, so that a resumed training repeats its dropout."""
import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Makes the random numbers of an iteration depend on the seed and its number alone.

    So a resumed training draws the dropout that an uninterrupted one draws, on every device, and
    without any state in the checkpoint. Needs ``randomness=dict(seed=...)`` for the data to
    follow the same order. Data loaders are not touched: mmengine replays them when it resumes.
    """

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        seed, = np.random.SeedSequence((runner.seed, runner.iter)).generate_state(1, np.uint64)
        torch.manual_seed(int(seed))
