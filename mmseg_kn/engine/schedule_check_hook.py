"""Tells at the start of a training whether it goes on where, and as, the config says."""
from os.path import realpath

from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.optim import _ParamScheduler
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop
from mmengine.runner.checkpoint import find_latest_checkpoint

# What says when a scheduler of mmengine does something.
_WHEN = ('begin', 'end', 'total_iters', 'T_max', 'step_size', 'milestones')


def _schedules(runner) -> list[tuple[str, dict]]:
    """Name and times of each parameter scheduler.

    None in validation and test, where the schedulers are settings that nothing is built from.
    """
    lists = runner.param_schedulers
    lists = lists.values() if isinstance(lists, dict) else [lists]  # one for each optimizer
    return [(type(scheduler).__name__,
             {name: getattr(scheduler, name) for name in _WHEN if hasattr(scheduler, name)})
            for several in lists if isinstance(several, list) for scheduler in several
            if isinstance(scheduler, _ParamScheduler)]


@HOOKS.register_module()
class ScheduleCheckHook(Hook):
    """Warns of what mmengine does at the start of a training without a word.

    * A resumed training goes on by the checkpoint's learning rate schedule, whatever the config
      says. If that is longer, the learning rate stays at its end (mmengine's FlexibleRunner, for
      FSDP and DeepSpeed, resumes before any hook is asked; there this is not seen).
    * An epoch ends with the sampler, and ``InfiniteSampler`` never ends: a training by epochs does
      not validate, save or finish.
    * ``--resume`` goes on from ``load_from``, where a config has one, and not from the last
      checkpoint of the work_dir.

    Raises:
        ValueError: A checkpoint to go on from holds weights alone, no state of a training.
    """

    def __init__(self) -> None:
        self.configured = []

    def before_run(self, runner) -> None:
        self.configured = _schedules(runner)  # the checkpoint comes next

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if not runner._resume:
            return
        own, given = find_latest_checkpoint(runner.work_dir), runner._load_from
        source = given or own
        other = own and realpath(own) != realpath(source)
        remedy = (f'to go on from {own} add --cfg-options load_from=None; ' if other else '') + (
            'to start a training from these weights take '
            f'--cfg-options load_from={source} without --resume')
        if 'iter' not in checkpoint.get('meta', {}):
            raise ValueError(
                '--resume needs a checkpoint that a training has saved, with its iteration and '
                f'optimizer; {source} holds weights alone; {remedy}')
        if other:
            runner.logger.warning(f'--resume goes on from {source}, which load_from names, and '
                                  f'not from {own}; {remedy}')

    def before_train(self, runner) -> None:
        differ = []
        for (name, found), (_, wanted) in zip(_schedules(runner), self.configured, strict=False):
            if keys := [key for key in found if found[key] != wanted.get(key)]:
                differ.append(' and '.join(f'{key}={found[key]}, not {wanted.get(key)}'
                                           for key in keys) + f' in {name}')
        if differ:
            runner.logger.warning(
                'the learning rate follows the schedule of the checkpoint, not that of the '
                f'config: {"; ".join(differ)}. For the schedule of the config start from the '
                'weights alone, without --resume: --cfg-options load_from=CHECKPOINT')
        loader = runner.train_dataloader
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and any(
                isinstance(getattr(part, 'sampler', None), InfiniteSampler)
                for part in (loader, loader.batch_sampler)):
            runner.logger.warning(
                'the first epoch will never end: train_cfg trains by epochs, and InfiniteSampler '
                'has no end. Set train_dataloader.sampler.type=DefaultSampler, or train by '
                'iterations: train_cfg.type=IterBasedTrainLoop with max_iters')
