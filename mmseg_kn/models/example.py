"""Runs a model on an example, to see in which order its layers work."""
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

_SMALL = (128, 128)  # tried first: which layer follows which does not depend on the size
_USUAL = (224, 224)


def first_tensor(model: nn.Module) -> Tensor:
    """A parameter or buffer, for its device and dtype."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            return tensor
    return torch.zeros(())


def image_channels(model: nn.Module) -> int:
    """How many channels the images of a segmentor, or of any network, have.

    Its first convolution says so. An attribute ``in_channels`` need not: mmseg's MobileNetV2
    keeps the channels of its last stage there.
    """
    backbone = getattr(model, 'backbone', model)
    convs = (m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    return getattr(next(convs, backbone), 'in_channels', 3)


def _images(model: nn.Module) -> Iterator[Tensor]:
    """Black images that the model may take, the cheapest first."""
    channels = image_channels(model)
    size = getattr(getattr(model, 'data_preprocessor', None), 'size', None) or _USUAL
    for height, width in dict.fromkeys([_SMALL, tuple(size)]):
        yield first_tensor(model).new_zeros(1, channels, height, width)


def _is_segmentor(model: nn.Module) -> bool:
    return hasattr(model, 'encode_decode')  # mmseg.models takes a second to import


def _predict(model: nn.Module, images: Tensor) -> None:
    if not _is_segmentor(model):
        model(images)
        return
    size = tuple(images.shape[2:])
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size)
    model.encode_decode(images, [meta] * len(images))


def _train(model: nn.Module, images: Tensor) -> None:
    """Auxiliary heads, and what else works in training alone; all labels are 0."""
    if not _is_segmentor(model):
        model(images)
        return
    samples = []
    for image in images:
        label = image.new_zeros(1, *image.shape[1:], dtype=torch.long)
        size = tuple(image.shape[1:])
        sample = SegDataSample(gt_sem_seg=PixelData(data=label),
                               gt_edge_map=PixelData(data=label.float()))
        sample.set_metainfo(dict(img_shape=size, ori_shape=size, pad_shape=size))
        samples.append(sample)
    model.loss(images, samples)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Restores modes, buffers and random numbers."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = first_tensor(model).device
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == 'cuda' else []):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def run_example(model: nn.Module, example: Tensor | tuple | Callable | None = None,
                norms: Iterable[nn.Module] = ()) -> list[str]:
    """Runs all that can be run, in evaluation and as in training; the model stays as it is.

    As in training means that auxiliary heads work, but layers without children (dropout, kernel
    normalization) and ``norms`` are in evaluation mode throughout: no statistics are changed, and
    one image is enough.

    Args:
        model: A segmentor of mmseg, or any module.
        example: Its input, the tuple of its arguments, or a function that is given the model and
            runs it. None takes a black image.
        norms: The normalization layers.

    Returns:
        What went wrong, one line for each attempt that failed.
    """
    norms = set(norms)
    failures = []
    for work, training in ((_predict, False), (_train, True)):
        with _undisturbed(model):
            for module in model.modules():  # train() would freeze layers, and more
                module.training = (training and module not in norms
                                   and next(module.children(), None) is not None)
            attempts = []
            if callable(example) and not isinstance(example, Tensor):
                attempts.append(lambda: example(model))
            elif isinstance(example, tuple):
                attempts.append(lambda: model(*example))
            elif example is not None:
                attempts.append(lambda work=work: work(model, example))
            else:
                attempts += [lambda work=work, image=image: work(model, image)
                             for image in _images(model)]
            faults = []
            for attempt in attempts:
                try:
                    attempt()
                    break
                except Exception as error:  # noqa: BLE001 (whatever a stranger's model raises)
                    faults.append(f'{type(error).__name__}: {error}'.split('\n')[0])
            else:
                failures += faults
    return failures
