"""The contract between the closed form and its implementations.

An implementation is a module with the functions of :class:`Passes`, each of which reads or
writes a full-size tensor once: :mod:`.fused` in torch operations, :mod:`.triton_passes` in
kernels. N samples, C channels in, O channels out, units at Ho x Wo positions.
"""
from typing import NamedTuple, Protocol

from torch import Tensor

from .geometry import Geometry


class Moments(NamedTuple):
    """Statistics of the units, (N, Ho, Wo) each."""

    mean: Tensor  # of the dropped input
    rstd: Tensor  # (var + eps) ** -0.5
    live: Tensor  # bool: the variance is above 0 and above its own rounding
    undropped_mean: Tensor | None  # mean of the input itself, where it was asked for
    drift: Tensor | None = None  # mean - undropped_mean, where it was taken along


class Shift(NamedTuple):
    """One product that is subtracted from the convolution's output: z -= of_channel * of_unit."""

    of_channel: Tensor | None  # (O,); None, of kernels only, stands for ones
    of_unit: Tensor  # (N, Ho, Wo)


class Kept(NamedTuple):
    """What forward keeps of its output (N, O, Ho, Wo) for backward: z, or y and the residual.

    z is the convolution's output, from which the shifts are still to be subtracted. Where y is
    kept, z * rstd = y - residual - bias; under a relu that holds where y is above 0, and
    elsewhere the gradient is 0. y and the residual cost no memory where the neighbouring layers
    keep them anyway. Neither is kept where the input needs no gradient and there is no relu.
    """

    z: Tensor | None = None
    y: Tensor | None = None
    residual: Tensor | None = None  # beside y, where one was added and there is no relu
    relu: bool = False
    weight_sum: Tensor | None = None  # (O,), where the weight need not be prepared again


class MomentGrads(NamedTuple):
    """What the moments of the units send back to the elements of x, (N, Ho, Wo) each.

    Summed by box^T and divided by K, they add unmasked + m * (constant + slope * x) to dx, with
    m 0 where an element was dropped and 1 elsewhere.
    """

    constant: Tensor
    slope: Tensor
    unmasked: Tensor | None


class MomentTerms(NamedTuple):
    """How the sums of h over channels become :class:`MomentGrads`.

    ``masked`` and ``unmasked`` say which means of a unit the output was shifted by: that of the
    dropped copy, and that of the input itself.
    """

    live: Tensor  # (N, Ho, Wo), bool
    q: float  # 1 / (1 - p) under dropout
    factor: float  # of the second moment
    masked: bool
    unmasked: bool

    @property
    def of_dvar(self) -> float:
        """slope / dvar"""
        return 2 * self.q**2 * self.factor

    def grads(self, to_mean: Tensor, to_var: Tensor, mean: Tensor, rstd: Tensor) -> MomentGrads:
        """From sum_o h * sum(W)_o and sum_o h * z * rstd, (N, Ho, Wo) as mean and rstd."""
        dvar = to_var * rstd * self.live * -0.5
        constant = 2 * mean * dvar
        if self.masked:
            constant = constant + to_mean
        return MomentGrads(constant * -self.q, dvar * self.of_dvar,
                           to_mean if self.unmasked else None)


class ScaledGrad(NamedTuple):
    """h = dL/dy * rstd and its sums."""

    h: Tensor  # (N, O, Ho, Wo)
    to_moments: MomentGrads | None  # None where dx is not wanted
    of_mean: Tensor  # sum_{n, p} h * mean, (O,)
    bias: Tensor  # sum_{n, p} dL/dy, (O,); no view, because an operator returns it


class Passes(Protocol):
    """What an implementation offers.

    ``mask`` is what it keeps of one draw of dropout, None where there is none. Only the
    implementation that drew it can read it: one keeps the places of the dropped elements, the
    other a seed.
    """

    def draw_mask(self, x: Tensor, dropout_p: float) -> Tensor:
        """Draws which elements of x (N, C, H, W) are dropped, each with ``dropout_p``."""

    def unit_moments(self, x: Tensor, geometry: Geometry, mask: Tensor | None, dropout_p: float,
                     factor: float, eps: float, exact: bool,
                     with_undropped_mean: bool) -> Moments:
        """Moments of every unit of x (N, C, H, W); var = max(factor * E2 - mean ** 2, 0).

        ``exact`` asks for sums that stay right where abs(mean) is much larger than the deviation.
        """

    def normalize(self, z: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
                  shifts: list[Shift], relu: bool, inplace: bool) -> Tensor:
        """(z - shifts) * scale + bias, plus ``residual`` or through relu.

        z and residual are (N, O, Ho, Wo), scale (N, Ho, Wo), bias (O,). z may be overwritten where
        ``inplace``.
        """

    def scale_grad(self, grad: Tensor, kept: Kept, mean: Tensor, rstd: Tensor,
                   weight_sum: Tensor, bias: Tensor | None, shifts: list[Shift],
                   terms: MomentTerms | None) -> ScaledGrad:
        """Scales ``grad`` = dL/dy (N, O, Ho, Wo) and reduces it.

        ``shifts`` are those of ``kept.z``, and empty where y is kept. ``terms`` is None where dx
        is not wanted.
        """

    def clear_dead(self, h: Tensor, live: Tensor) -> None:
        """Makes h (N, O, Ho, Wo) 0 in place where ``live`` (N, Ho, Wo) is False."""

    def add_moment_grads(self, dx: Tensor, x: Tensor, geometry: Geometry, mask: Tensor | None,
                         dropout_p: float, grads: MomentGrads, rectified: bool) -> Tensor:
        """Adds to dx (N, C, H, W), in place, what reaches x through the moments of its units.

        ``rectified`` says that x is a relu's output: then dx is 0 where x is 0, as the gradient
        of the relu's input is.
        """

    def normalize_pixels(self, x: Tensor, mean: Tensor, rstd: Tensor, relu: bool) -> Tensor:
        """(x - mean) * rstd of every pixel of x (N, C, H, W), or its relu."""

    def normalize_pixels_backward(self, grad: Tensor, x: Tensor, mask: Tensor | None,
                                  dropout_p: float, mean: Tensor, rstd: Tensor,
                                  terms: MomentTerms, y: Tensor | None) -> Tensor:
        """dx of :meth:`normalize_pixels` from dL/dy (N, C, H, W), through mean and rstd as well.

        ``y`` is its output where that went through a relu, else None.
        """

    def prepare_weight(self, weight: Tensor, x: Tensor, centred: bool) -> tuple[Tensor, Tensor,
                                                                               Tensor | None]:
        """weight (O, C / groups, kh, kw) as x is convolved with it, and its sums, (O,) each.

        It is taken less the mean of each filter if ``centred``, in the dtype of x. The sums are of
        the weight, and in half precision, else None, of what it was rounded to.
        """

    def finish_weight_grad(self, grad: Tensor, of_mean: Tensor, weight: Tensor) -> Tensor:
        """grad (O, C / groups, kh, kw) less of_mean (O,), in dtype and memory format of weight."""
