"""Finds out which normalization works on the output of which convolution."""
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from mmcv.cnn.bricks.wrappers import Conv2d as MMCVConv2d
from torch import Tensor, nn

from .example import run_example


class Matches(NamedTuple):
    """What was found in a model.

    convs: Normalization -> the convolutions whose output is all that it normalizes; empty where
        it has to stay a layer of its own.
    ranks: Normalization -> dimensions of its input, where it was run.
    unknown: Normalizations of which nothing is known.
    failures: What went wrong in running the model.
    """
    convs: dict[nn.Module, list[nn.Conv2d]]
    ranks: dict[nn.Module, int]
    unknown: list[nn.Module]
    failures: list[str]


def is_plain(conv: nn.Module) -> bool:
    """Whether a KNConv2d can take the place of a module and its weight."""
    return (type(conv) in (nn.Conv2d, MMCVConv2d) and conv.padding_mode == 'zeros'
            and isinstance(conv._parameters.get('weight'), nn.Parameter)
            and not conv._forward_hooks and not conv._forward_pre_hooks)


class _Watch:
    """Hooks that follow the outputs of convolutions, by the tensors themselves."""

    def __init__(self, model: nn.Module, norms: Iterable[nn.Module]) -> None:
        self.calls = defaultdict(int)  # of each convolution
        self.sources = defaultdict(list)  # of each normalization: (convolution, call) or None
        self.ranks = {}
        norms = set(norms)
        self.handles = []
        for module in model.modules():
            if is_plain(module):
                self.handles.append(module.register_forward_hook(self._made))
            if module in norms:
                self.handles.append(module.register_forward_pre_hook(self._normalized,
                                                                     with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    # A tensor's version says whether anything was written to it since.

    def _made(self, conv, args, output: Tensor) -> None:
        self.calls[conv] += 1
        output._kn_source = (output._version, conv, self.calls[conv])

    def _normalized(self, norm, args, kwargs) -> None:
        input = (args or tuple(kwargs.values()))[0]
        self.ranks[norm] = input.dim()
        version, *source = getattr(input, '_kn_source', (None, None, None))
        self.sources[norm].append(tuple(source) if version == input._version else None)


def _convs_of(watch: _Watch) -> dict[nn.Module, list[nn.Conv2d]]:
    """Keeps the matches in which all calls agree.

    A convolution is one only if each of its outputs goes into exactly one normalization, and a
    normalization only if it gets nothing else; whoever drops out takes its partners along.
    """
    convs = {norm: dict.fromkeys(source and source[0] for source in sources).keys()
             for norm, sources in watch.sources.items()}
    outputs = defaultdict(list)
    for sources in watch.sources.values():
        for source in filter(None, sources):
            outputs[source[0]].append(source[1])
    good = {conv for conv, calls in watch.calls.items()
            if sorted(outputs[conv]) == list(range(1, calls + 1))}
    while True:
        bad = {norm for norm, sources in convs.items() if not sources <= good}
        lost = {conv for norm in bad for conv in convs[norm]} & good
        if not lost:
            break
        good -= lost
    return {norm: [] if norm in bad else list(sources) for norm, sources in convs.items()}


def _by_children(model: nn.Module, norms: set[nn.Module]) -> dict[nn.Module, list[nn.Conv2d]]:
    """Matches by the order of children in their parent, for layers that were not run."""
    found = {}
    for parent in model.modules():
        order = getattr(parent, 'order', ())  # of mmcv's ConvModule, the only one that has it
        before = None
        for child in parent.children():
            if child in norms:
                if 'norm' in order and order.index('norm') < order.index('conv'):
                    found[child] = []
                elif is_plain(before) and before.out_channels == getattr(
                        child, 'num_features', before.out_channels):
                    found[child] = [before]
            before = child
    return found


def match(model: nn.Module, norms: list[nn.Module],
          example: Tensor | tuple | Callable | None = None) -> Matches:
    """Matches ``norms`` with the convolutions before them by running ``model``.

    Layers that no run reaches are matched by the order of children in their parent.
    """
    watch = _Watch(model, norms)
    try:
        failures = run_example(model, example, norms)
    finally:
        watch.remove()
    convs = _convs_of(watch)
    unseen = {norm for norm in norms if norm not in convs}
    guessed = {norm: found for norm, found in _by_children(model, unseen).items()
               if not watch.calls.keys() & set(found)}
    convs.update(guessed)
    unknown = [norm for norm in norms if norm not in convs]
    return Matches(convs, watch.ranks, unknown, failures)
