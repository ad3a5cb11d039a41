"""Steps of DP-SGD: clip each sample's gradient, sum, add noise, account."""
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext

import torch
from mmengine.dist import get_dist_info
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import get_optimizer_class
from torch import Tensor, nn

from .grad_sample import GradSampler
from .randomness import secret_generator

ACCOUNTANTS = ('prv', 'rdp')  # opacus's third, gdp, may say too little
CLIPPINGS = ('flat', 'ghost')


def spent_epsilon(accountant: str, history: Iterable, delta: float) -> float:
    """Epsilon at ``delta`` of ``history``, triples (noise multiplier, sampling rate, steps)."""
    history = [tuple(entry) for entry in history]
    if not history:
        return 0.0
    if any(not noise_multiplier for noise_multiplier, *_ in history):
        return float('inf')
    counter = create_accountant(accountant)
    counter.history = history
    return float(counter.get_epsilon(delta))


@OPTIM_WRAPPERS.register_module()
class DPOptimWrapper(OptimWrapper):
    r"""mmengine's ``OptimWrapper`` for differentially private SGD.

    .. math::
        \bar g = \frac 1 B \Big(\sum_i g_i \min(1, C / \lVert g_i \rVert) +
                 \mathcal N(0, \sigma^2 C^2)\Big)

    goes to the optimizer, where i runs over the samples that a Poisson batch drew, g_i is the
    gradient of sample i over all parameters and B the expected batch size, over all processes.
    It works with ``DPIterBasedTrainLoop``, ``PoissonBatchSampler`` and ``DPHook``, which attaches
    it to the model. Noise comes from a generator seeded by the operating system, not by the seed
    of the training, which the checkpoint holds.

    Args:
        optimizer: Any optimizer; it sees the noised gradient only.
        max_grad_norm: C, in the unit of the gradient's norm.
        target_delta: delta of the guarantee; should be well below 1 / number of items.
        noise_multiplier: sigma. 0 clips without noise, epsilon is infinite then.
        target_epsilon: In place of ``noise_multiplier``: the smallest sigma that keeps epsilon
            within it to the end of training.
        accountant: ``'prv'`` (tightest) or ``'rdp'``, opacus's.
        clipping: ``'flat'``, or ``'ghost'``: a second backward pass in place of keeping the
            gradients of all samples and layers at once.
        dtype: ``'bfloat16'`` runs forward under autocast; None does not.
        noise_seed: Makes noise repeatable, and void as a protection: for tests.

    Raises:
        ValueError: An argument does not fit, or one of ``OptimWrapper`` is set that would break
            the guarantee.
    """

    def __init__(self,
                 optimizer,
                 max_grad_norm: float,
                 target_delta: float,
                 noise_multiplier: float | None = None,
                 target_epsilon: float | None = None,
                 accountant: str = 'prv',
                 clipping: str = 'flat',
                 dtype: str | None = None,
                 noise_seed: int | None = None,
                 accumulative_counts: int = 1,
                 clip_grad: dict | None = None) -> None:
        if clip_grad is not None:
            raise ValueError(f'clip_grad={clip_grad} clips the gradient of the batch, which '
                             'bounds no sample; remove it (clip_grad=None), max_grad_norm clips '
                             'each sample')
        if accumulative_counts != 1:
            raise ValueError(f'accumulative_counts={accumulative_counts} would take several '
                             'Poisson batches for one; leave it at 1 and set '
                             'train_cfg.max_physical_batch_size to save memory')
        if (noise_multiplier is None) == (target_epsilon is None):
            raise ValueError('give noise_multiplier or target_epsilon, one of both; got '
                             f'noise_multiplier={noise_multiplier}, '
                             f'target_epsilon={target_epsilon}')
        for name, value in (('noise_multiplier', noise_multiplier),
                            ('target_epsilon', target_epsilon), ('max_grad_norm', max_grad_norm)):
            if value is not None and not (value > 0 or name == 'noise_multiplier' and value == 0):
                raise ValueError(f'{name} must be positive, got {value}')
        if not 0 < target_delta < 1:
            raise ValueError(f'target_delta must be in (0, 1), got {target_delta}; well below '
                             '1 / number of items is usual, e.g. 1e-5')
        for name, value, choices in (('accountant', accountant, ACCOUNTANTS),
                                     ('clipping', clipping, CLIPPINGS),
                                     ('dtype', dtype, (None, 'bfloat16'))):
            if value not in choices:
                raise ValueError(f'{name} must be one of {choices}, got {value!r}')
        super().__init__(optimizer)
        self.max_grad_norm = float(max_grad_norm)
        self.target_delta = float(target_delta)
        self.noise_multiplier = noise_multiplier
        self.target_epsilon = target_epsilon
        self.accountant = accountant
        self.clipping = clipping
        self.dtype = dtype
        self.noise_seed = noise_seed
        self.grad_sampler = None
        self.more_parts = False  # of the logical batch follow: accumulate, do not step yet
        self.num_samples = None  # in this part, where it is known

    def attach(self, model: nn.Module, *, sample_rate: float, batch_size: int, steps: int,
               num_items: int, state: dict | None = None) -> None:
        """Readies ``model`` and the optimizer, for ``steps`` steps in all.

        Args:
            sample_rate: q, of each item in each batch.
            batch_size: Expected, of this process.
            num_items: Size of the dataset.
            state: :meth:`privacy_state` of the checkpoint that training goes on from.

        Raises:
            ValueError: ``state`` had another target, or was to reach it under other settings.
        """
        setting = dict(target_epsilon=self.target_epsilon, target_delta=self.target_delta,
                       max_grad_norm=self.max_grad_norm, sample_rate=sample_rate, steps=steps,
                       num_items=num_items, accountant=self.accountant)
        if self.target_epsilon is not None:
            if state is None:
                self.noise_multiplier = get_noise_multiplier(
                    target_epsilon=self.target_epsilon, target_delta=self.target_delta,
                    sample_rate=sample_rate, steps=steps, accountant=self.accountant)
            else:
                changed = {k: (state[k], v) for k, v in setting.items() if state[k] != v}
                if changed:
                    raise ValueError(
                        'the noise for target_epsilon was found under other settings, (then, '
                        f'now): {changed}; restore them, or go on with noise_multiplier='
                        f'{state["noise_multiplier"]} in place of target_epsilon')
                self.noise_multiplier = state['noise_multiplier']
        rank, world_size = get_dist_info()
        self.setting = dict(setting, batch_size=batch_size * world_size, clipping=self.clipping,
                            noise_multiplier=float(self.noise_multiplier),
                            noise_seed=self.noise_seed)
        counter = create_accountant(self.accountant)
        counter.history = [tuple(entry) for entry in state['history']] if state else []
        self.counter = counter

        optimizer = self.optimizer
        device = optimizer.param_groups[0]['params'][0].device
        generator = secret_generator(device) if self.noise_seed is None else (
            torch.Generator(device).manual_seed(self.noise_seed))
        self.optimizer = get_optimizer_class(
            'flat', world_size > 1, 'ghost' if self.clipping == 'ghost' else None)(
                optimizer, noise_multiplier=self.noise_multiplier,
                max_grad_norm=self.max_grad_norm, expected_batch_size=batch_size,
                generator=generator)
        self.optimizer.attach_step_hook(counter.get_optimizer_hook_fn(sample_rate))

        self.model = model
        self.grad_sampler = GradSampler(model)

    @contextmanager
    def optim_context(self, model: nn.Module):
        with super().optim_context(model), (
                autocast(dtype=torch.bfloat16) if self.dtype else nullcontext()):
            yield

    def update_params(self, loss: Tensor, step_kwargs: dict | None = None,
                      zero_kwargs: dict | None = None) -> None:
        """Clips the gradients of the samples that ``loss`` is the mean of; then steps.

        Raises:
            ValueError: No ``DPHook`` has attached the model, or a parameter got no gradient.
        """
        if self.grad_sampler is None:
            raise ValueError('DPOptimWrapper has not been attached to the model; add '
                             "custom_hooks=[dict(type='DPHook')] and "
                             "train_cfg=dict(type='DPIterBasedTrainLoop', ...)")
        self.backward(loss)
        self.step(**(step_kwargs or {}))
        self.zero_grad(**(zero_kwargs or {}))

    def backward(self, loss: Tensor, **kwargs) -> None:
        """Leaves per-sample gradients, or under ghost clipping the clipped sum of them."""
        ghost, sampler = self.clipping == 'ghost', self.grad_sampler
        sampler.keep = 'norms' if ghost else 'gradients'
        super().backward(loss, retain_graph=ghost, **kwargs)
        kept = {name: p.norm_sample if ghost else p.grad_sample
                for name, p in self.model.named_parameters() if p.requires_grad}
        unused = [name for name, value in kept.items() if value is None]
        if unused:
            raise ValueError(f'{len(unused)} parameters take no part in the loss, e.g. '
                             f'{unused[0]}; set requires_grad=False for them or remove their '
                             'layers')
        count = self.num_samples
        for name, value in kept.items():
            if count is not None and len(value) != count:
                raise ValueError(f'not private: {count} images gave {len(value)} gradients of '
                                 f'{name}, each clipped by itself; its layer must see an image '
                                 'as one sample')
        if ghost:
            sampler.clip_factors = (self.max_grad_norm / (sampler.norms() + 1e-6)).clamp(max=1)
            sampler.keep = 'clipped sum'
            loss.backward()
            for p in sampler.parameters:
                p.grad = p.clipped_sum

    def zero_grad(self, **kwargs) -> None:
        super().zero_grad(**kwargs)
        if self.grad_sampler is not None:
            self.grad_sampler.clear()

    def step(self, **kwargs) -> None:
        self.optimizer.signal_skip_step(self.more_parts)
        self.optimizer.step(**kwargs)

    def step_empty(self) -> None:
        """The step of a batch without items: noise alone."""
        for p in self.optimizer.params:
            p.grad, p.grad_sample = torch.zeros_like(p), p.new_zeros((0, *p.shape))
        self._inner_count += 1
        self.step()
        self.zero_grad()

    def epsilon(self) -> float:
        """Spent so far, at ``target_delta``; infinite where the noise can be repeated."""
        if self.noise_seed is not None:
            return float('inf')
        return spent_epsilon(self.accountant, self.counter.history, self.target_delta)

    def privacy_state(self) -> dict:
        """What the guarantee rests on, and the steps so far: plain values, for a checkpoint."""
        return dict(self.setting, history=[tuple(entry) for entry in self.counter.history])
