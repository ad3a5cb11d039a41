"""What every stage of a KNResNet is made of: one table of depths, and its two variants.

Source: R. Nasirigerdeh, R. Torkzadehmahani, D. Rueckert, G. Kaissis, "Kernel Normalized
Convolutional Networks", TMLR 2024, https://arxiv.org/abs/2205.10089, and their repository
norm-torch, which the table and the classification variant are from. Depth 101 and the variant for
dense prediction are ours.
"""
from collections.abc import Sequence
from typing import NamedTuple

NUM_STAGES = 4


class Arch(NamedTuple):
    """A depth of the authors' table."""

    stem: int  # channels after the stem
    channels: tuple[int, ...]  # of each stage's output
    inner: tuple[int, ...]  # inside each stage's blocks
    blocks: tuple[int, ...]  # how many, of each stage
    bottleneck: bool


ARCHS = {
    18: Arch(64, (64, 256, 512, 724), (256, 256, 512, 724), (2, 2, 1, 1), False),
    34: Arch(64, (64, 256, 512, 512), (256, 320, 640, 843), (4, 5, 3, 2), False),
    50: Arch(256, (256, 512, 810, 2048), (64, 128, 201, 512), (4, 5, 4, 2), True),
    101: Arch(256, (256, 512, 810, 2048), (64, 128, 201, 512), (4, 5, 21, 2), True),
}


class TransitionSpec(NamedTuple):
    """How a stage opens: relu, KNConv, max pool 2x2."""

    kernel_size: int  # of the convolution
    padding: tuple[int, int, int, int]  # of the convolution: left, right, top, bottom
    stride: int  # of the pool
    dilation: int  # of both
    ceil_mode: bool  # of the pool: odd sizes round up


class StageSpec(NamedTuple):
    """A stage: its transition, None in the first stage, and its residual blocks."""

    channels: int
    inner: int
    kernels: tuple[int, ...]  # of each block
    dilations: tuple[int, ...]  # one for each block
    transition: TransitionSpec | None


def _padding(stage: int, dilation: int) -> tuple[int, int, int, int]:
    """The 2x2 convolution of a transition pads one side, so that the map keeps its size."""
    return (0, dilation, 0, dilation) if stage == 2 else (dilation, 0, dilation, 0)


def _stages(depth: int, strides: Sequence[int], dilations: Sequence[Sequence[int]],
            ceil_mode: bool, last_padding: tuple[int, int, int, int]) -> list[StageSpec]:
    """The stages of a depth; ``dilations`` are those of each stage's blocks."""
    arch = ARCHS[depth]
    specs = []
    for i in range(NUM_STAGES):
        # The last stage of the bottleneck depths has 1x1 kernels in place of 2x2.
        pointwise = arch.bottleneck and i == NUM_STAGES - 1
        kernels = ((1, 3, 1) if pointwise else (2, 3, 2)) if arch.bottleneck else (2, 2)
        transition = None
        if i > 0:
            previous = dilations[i - 1][-1]
            padding = last_padding if i == NUM_STAGES - 1 else _padding(i, previous)
            transition = TransitionSpec(1 if pointwise else 2,
                                        (0, 0, 0, 0) if pointwise else padding,
                                        strides[i], previous, ceil_mode)
        specs.append(StageSpec(arch.channels[i], arch.inner[i], kernels, tuple(dilations[i]),
                               transition))
    return specs


def dense_stages(depth: int, strides: Sequence[int], dilations: Sequence[int],
                 multi_grid: Sequence[int] | None = None) -> list[StageSpec]:
    """Stages for dense prediction: sizes halve rounding up, so every position has its features.

    Args:
        depth, strides, dilations, multi_grid: See :class:`mmseg_kn.KNResNet`.

    Raises:
        ValueError: An argument does not fit.
    """
    check_depth(depth)
    for name, values in (('strides', strides), ('dilations', dilations)):
        if len(values) != NUM_STAGES or any(v < 1 for v in values):
            raise ValueError(f'{name} must be {NUM_STAGES} positive ints, one for each stage, '
                             f'got {values}')
    if strides[0] != 1 or any(s > 2 for s in strides):
        raise ValueError('strides must be 1 or 2, and 1 in the first stage (the stem already '
                         f'divides by 4), got {strides}')
    blocks = ARCHS[depth].blocks
    if multi_grid is not None and len(multi_grid) != blocks[-1]:
        raise ValueError(f'multi_grid must have one dilation for each of the {blocks[-1]} blocks '
                         f"of depth {depth}'s last stage, got {multi_grid}")
    of_blocks = [[d] * n for d, n in zip(dilations, blocks, strict=True)]
    if multi_grid is not None:
        of_blocks[-1] = multi_grid
    return _stages(depth, strides, of_blocks, True, _padding(NUM_STAGES - 1, dilations[-2]))


def classifier_stages(depth: int, low_resolution: bool) -> list[StageSpec]:
    """Stages of the authors' classification models: sizes halve rounding down.

    For images that are not small, the 2x2 convolution that opens stage 4 pads one more on every
    side.

    Raises:
        ValueError: There is no such depth.
    """
    check_depth(depth)
    return _stages(depth, (1, 2, 2, 2), [[1] * n for n in ARCHS[depth].blocks], False,
                   (1, 0, 1, 0) if low_resolution else (2, 1, 2, 1))


def check_depth(depth: int) -> None:
    if depth not in ARCHS:
        raise ValueError(f'depth must be one of {tuple(ARCHS)}, got {depth}')
