"""Training by Poisson batches of varying size, in parts that fit into memory."""
import itertools

from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import IterBasedTrainLoop

from .sampler import forbid_refetch, split_batch


@LOOPS.register_module()
class DPIterBasedTrainLoop(IterBasedTrainLoop):
    """mmengine's ``IterBasedTrainLoop`` whose iteration is one Poisson batch and one step.

    Args:
        runner, dataloader, max_iters, val_begin, val_interval, dynamic_intervals: As in
            ``IterBasedTrainLoop``.
        max_physical_batch_size: Images that pass through the model at once; larger batches come
            in parts whose clipped gradients are summed. None: all at once.

    Raises:
        ValueError: ``max_physical_batch_size`` is below 1, or there is no ``DPHook``.
    """

    def __init__(self, runner, dataloader, *args, max_physical_batch_size: int | None = None,
                 **kwargs) -> None:
        if max_physical_batch_size is not None and max_physical_batch_size < 1:
            raise ValueError('max_physical_batch_size must be at least 1 or None, got '
                             f'{max_physical_batch_size}')
        self.max_physical_batch_size = max_physical_batch_size
        if isinstance(dataloader, dict):
            dataloader.setdefault('collate_fn', dict(type='private_collate'))
            dataloader['worker_init_fn'] = dict(type='seed_worker_secretly')
            if isinstance(dataloader['dataset'], dict):
                forbid_refetch(dataloader['dataset'])
        super().__init__(runner, dataloader, *args, **kwargs)

    def run(self) -> None:
        # By its registered name: the hook's module imports the checks, which import this one.
        if not any(isinstance(hook, HOOKS.get('DPHook')) for hook in self.runner.hooks):
            raise ValueError("DPIterBasedTrainLoop needs DPHook, which attaches privacy to the "
                             "model: custom_hooks=[dict(type='DPHook'), ...]")
        # mmengine would skip as many batches as were trained on; these are drawn by chance.
        if hasattr(self, 'fast_forward_on_resume'):
            self.fast_forward_on_resume = True  # the fork's word for it
        else:
            self.dataloader_iterator = itertools.chain(
                itertools.repeat(None, self._iter), self.dataloader_iterator)
        return super().run()

    def run_iter(self, data_batch: dict) -> None:
        runner, wrapper = self.runner, self.runner.optim_wrapper
        runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=data_batch)
        parts, outputs = split_batch(data_batch, self.max_physical_batch_size), {}
        for i, part in enumerate(parts):
            wrapper.more_parts = i + 1 < len(parts)
            wrapper.num_samples = len(part['inputs'])
            share = wrapper.num_samples / len(data_batch['inputs'])
            for name, value in runner.model.train_step(part, optim_wrapper=wrapper).items():
                outputs[name] = outputs.get(name, 0) + share * value.detach()
        if not parts:
            wrapper.step_empty()
        runner.call_hook('after_train_iter', batch_idx=self._iter, data_batch=data_batch,
                         outputs=outputs)
        self._iter += 1
