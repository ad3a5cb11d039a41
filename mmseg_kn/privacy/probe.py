"""Measures, on real data, whether samples of a batch influence each other's gradients."""
import copy

import torch
from mmengine.structures import PixelData
from torch import Tensor, nn

_TOLERANCE = 1e-3  # of the gradient's norm; what mixes samples changes it by far more


def check_batch(model: nn.Module, optim_wrapper, data_batch: dict) -> None:
    """Refuses a model under which a sample's gradient depends on the rest of the batch.

    The gradient of one sample must not change when its neighbour is another, in training mode
    and with the same random numbers; the gradients of the samples must add up to that of the
    batch; the loss of two must be the mean of theirs; and nothing may change in a forward pass.
    What :mod:`.checks` does not know by name shows here.

    Args:
        model: With per-sample gradients attached.
        optim_wrapper: The ``DPOptimWrapper`` that attached them.
        data_batch: As the data loader gives it, at least one sample.

    Raises:
        ValueError: One of these is violated.
    """
    ignore_index = getattr(getattr(model, 'decode_head', None), 'ignore_index', 255)
    sample, neighbour, other = _three_samples(data_batch, ignore_index)
    state = {name: value.detach().clone() for name, value in _state(model)}
    beside, instead = (_gradients(model, optim_wrapper, [sample, second])
                       for second in (neighbour, other))
    changed = [name for name, value in _state(model) if not torch.equal(value, state[name])]
    if changed:
        raise ValueError(f'not private: a forward pass changed {changed[0]}, which carries data '
                         'past the noise; take a layer without running values')
    a, b = (torch.cat([samples[0].flatten() for samples, _ in gradients.values()])
            for gradients in (beside, instead))
    influence = ((a - b).norm() / a.norm().clamp(min=torch.finfo(a.dtype).tiny)).item()
    if not influence < _TOLERANCE:
        raise ValueError('not private: the gradient of a sample changed by '
                         f'{100 * influence:.1f} % when another image stood beside it, so that '
                         'clipping bounds nothing; look for a layer that mixes samples (any '
                         'BatchNorm) or a loss that is no mean over samples')
    for name, (samples, grad) in beside.items():
        if not (samples.mean(0) - grad).norm() <= 0.02 * grad.norm() + 1e-7:
            raise ValueError(f'the gradients of the samples do not add up to that of {name}, of '
                             f'norm {grad.norm():.3g}; its layer may pad otherwise than with '
                             'zeros, its weight be used outside of it, or gradients explode, as '
                             'without ReLU where images are black and biases zero')
    losses = [_loss(model, optim_wrapper, batch) for batch in (
        [sample], [other], [sample, other])]
    mean = (losses[0] + losses[1]) / 2
    if not abs(losses[2] - mean) <= 1e-2 * abs(mean) + 1e-6:
        raise ValueError(f'not private: the loss of two samples, {losses[2]:.4g}, is not the mean '
                         f'of theirs, {mean:.4g}; take a loss that is a mean over samples')


def _state(model: nn.Module):
    return [*model.named_buffers(), *model.named_parameters()]


def _three_samples(data_batch: dict, ignore_index: int) -> list[tuple]:
    """A sample, a neighbour, and that neighbour with another image and other labels.

    A label that is a plain number, or a tensor of one, becomes that of the first sample: no other
    is known to be one.
    """
    samples = list(zip(data_batch['inputs'], data_batch['data_samples'], strict=True))[:2]
    samples = (samples + samples)[:2]
    image, data_sample = copy.deepcopy(samples[1])
    if not hasattr(data_sample, 'items'):
        return [*samples, (image.max() - image.flip(-1), copy.deepcopy(samples[0][1]))]
    for name, field in data_sample.items():
        if isinstance(field, PixelData):
            left = field.data[..., :field.data.size(-1) // 2]
            left.fill_(ignore_index if name == 'gt_sem_seg' else field.data.max())
    return [*samples, (image.max() - image.flip(-1), data_sample)]


def _forward(model: nn.Module, optim_wrapper, samples: list[tuple]) -> Tensor:
    inputs, data_samples = zip(*copy.deepcopy(samples), strict=True)  # padding writes to them
    labels = list(data_samples)
    if all(isinstance(label, Tensor) for label in labels):
        labels = torch.stack(labels)  # as they came
    data = model.data_preprocessor(dict(inputs=list(inputs), data_samples=labels), True)
    with optim_wrapper.optim_context(model):
        return model.parse_losses(model(**data, mode='loss'))[0]


def _gradients(model: nn.Module, optim_wrapper, samples: list[tuple]) -> dict[str, tuple]:
    """Per-sample gradients of each parameter, and autograd's gradient of the batch."""
    model.train()
    sampler, device = optim_wrapper.grad_sampler, next(model.parameters()).device
    sampler.keep = 'gradients'
    with torch.random.fork_rng([device] if device.type == 'cuda' else []):
        torch.manual_seed(0)
        _forward(model, optim_wrapper, samples).backward()
    gradients = {name: (p.grad_sample, p.grad) for name, p in model.named_parameters()
                 if p.requires_grad and p.grad_sample is not None}
    optim_wrapper.zero_grad(set_to_none=True)  # and leave the tensors that are returned
    return gradients


@torch.no_grad()
def _loss(model: nn.Module, optim_wrapper, samples: list[tuple]) -> float:
    model.eval()  # without the dropout of training, which differs by batch
    loss = _forward(model, optim_wrapper, samples).item()
    model.train()
    return loss
