"""Functional kernel normalization: :func:`kn_conv2d` and :func:`kernel_norm2d`.

Source: R. Nasirigerdeh, R. Torkzadehmahani, D. Rueckert, G. Kaissis, "Kernel Normalized
Convolutional Networks", TMLR 2024, https://arxiv.org/abs/2205.10089.

The way of an input: :mod:`.functional` refuses what does not fit, :mod:`.dispatch` chooses the
implementation, :mod:`.ways` hands the call to :mod:`.autograd` or, for compilers, to
:mod:`.operators`, :mod:`.closed_form` computes it in the passes of :mod:`.fused` or
:mod:`.triton_passes`, and :mod:`.unfolded` where the input is tiny. :mod:`.reference` is the
definition that all of them are tested against.
"""
from .dispatch import IMPLS, chosen_impl
from .functional import kernel_norm2d, kn_conv2d

__all__ = ['IMPLS', 'chosen_impl', 'kernel_norm2d', 'kn_conv2d']
