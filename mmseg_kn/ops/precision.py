"""The dtype that sums are taken in, and every threshold below which rounding would show."""
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
        self.is_centred = groups == 1 and (
            self.is_half or not self.has_dropout or dropout_p < SMALL_DROPOUT)
        self.needs_undropped_mean = self.has_dropout and (self.is_half or self.is_centred)
