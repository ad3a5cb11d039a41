"""The dtype that sums are taken in, and every threshold below which rounding would show."""
from contextlib import AbstractContextManager, nullcontext
from threading import Lock

import torch
from torch import Tensor

from .geometry import Geometry, expected_moments_factor

# A variance counts as above 0 only if it exceeds this many units of the rounding of E2.
LIVE_ROUNDINGS = 64
# Channels of a pixel whose mean its sums are taken around. One channel may be an outlier.
ORIGIN_CHANNELS = 16
# Below this dropout_p the uniform numbers that place the dropped elements are float64: float32
# knows them to 2 ** -24, which must be small beside dropout_p.
SMALL_DROPOUT = 1e-2
# Dropout keeps E2 - mean ** 2 from cancelling, unless all elements of a unit may happen to stay.
RARE = 1e-5
# So does the expectation over dropout, if it raises the second moment by this factor.
NOISY_FACTOR = 1.01

_NOTHING = nullcontext()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Setting:
    """How one call computes: what follows from its arguments before any value is read.

    Attributes:
        has_dropout: Whether the statistics are those of a dropped copy.
        factor: E[var] = factor * E2 - mean ** 2; 1 in training.
        exact: Whether E2 - mean ** 2 may cancel, so that sums are taken around an origin and
            combined in float64.
        is_half: Whether the input has fewer bits than the sums.
        is_centred: Whether the convolution takes the weight less its mean, which takes the mean
            of the unit away by itself: mean = conv(x, 1 / K). In float32 this is left out where
            dropout's noise bounds abs(mean) * rstd, to about 1 / sqrt(dropout_p).
        cancels: Whether the convolution's output, less the mean of the unit, may be far smaller
            than the output: then its operands must not be rounded.
        needs_undropped_mean: Whether the mean of the input itself is needed beside that of the
            dropped copy.
    """

    def __init__(self, x: Tensor, geometry: Geometry, dropout_p: float, training: bool,
                 groups: int = 1) -> None:
        kh, kw = geometry.kernel
        unit = x.size(1) * kh * kw
        self.has_dropout = training and dropout_p > 0
        self.factor = 1.0 if training else expected_moments_factor(dropout_p, unit)
        noisy = (1 - dropout_p)**unit < RARE if training else self.factor > NOISY_FACTOR
        self.exact = not noisy or x.dtype == torch.float64
        self.is_half = accumulate_dtype(x.dtype) != x.dtype
        self.cancels = not self.has_dropout or dropout_p < SMALL_DROPOUT
        self.is_centred = groups == 1 and (self.is_half or self.cancels)
        self.needs_undropped_mean = self.has_dropout and (self.is_half or self.is_centred)


def _may_use_tf32(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.float32 and not torch.compiler.is_compiling()


class _WithoutTF32:
    """A context in which no convolution of the process takes TF32; threads may be in it at once.

    The flag is the whole process's, so the first to enter changes it and the last to leave puts
    it back.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.before = Lock(), 0, None

    @staticmethod
    def _flag() -> tuple[object, str, str | bool]:
        # torch 2.9 has a flag for convolutions alone; to read the older one as well is an error.
        return ((torch.backends.cudnn.conv, 'fp32_precision', 'ieee')
                if hasattr(torch.backends.cudnn, 'conv')
                else (torch.backends.cudnn, 'allow_tf32', False))

    def __enter__(self) -> None:
        flags, name, full = self._flag()
        with self.lock:
            if not self.inside:
                self.before = getattr(flags, name)
                setattr(flags, name, full)
            self.inside += 1

    def __exit__(self, *_) -> None:
        flags, name, _ = self._flag()
        with self.lock:
            self.inside -= 1
            if not self.inside:
                setattr(flags, name, self.before)


_WITHOUT_TF32 = _WithoutTF32()


def unrounded_convolution(x: Tensor, setting: Setting) -> AbstractContextManager[None]:
    """A context in which convolutions of x take no TF32 where ``setting.cancels``.

    By default cuDNN rounds float32 operands to the 10 bits of TF32's mantissa. A plain convolution
    loses 3e-4 by that. One whose mean is then subtracted loses as much of the mean, and on a
    bright, flat image (1 +- 0.01) 3e-2 of what remains.
    """
    return _WITHOUT_TF32 if setting.cancels and _may_use_tf32(x) else _NOTHING
