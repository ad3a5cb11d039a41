"""The stem is watched while it trains, and its loss is reported once."""
import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MessageHub
from torch import nn

from mmseg_kn import KNConv2d
from mmseg_kn.engine.stem_signal_hook import StemSignalHook, signal_share


def test_signal_share():
    torch.manual_seed(0)
    noise = torch.randn(2, 50, 40, 40)
    offsets = torch.randn(50)
    offsets = (offsets - offsets.mean()) / offsets.std(correction=0)
    assert signal_share(noise) > 0.99
    assert signal_share(offsets[:, None, None].expand_as(noise)) < 1e-6
    # as much variance within channels as between them
    assert signal_share(noise + offsets[:, None, None]) == pytest.approx(0.5, abs=0.01)
    # a constant that all channels share is taken away by the next layer
    assert signal_share(noise + 100) > 0.99
    assert signal_share(torch.zeros(1, 3, 4, 4)) == 0


@pytest.fixture
def runner(caplog):
    model = nn.Sequential(KNConv2d(3, 16, 3, padding=1), nn.ReLU(), KNConv2d(16, 4, 1))
    caplog.set_level(logging.WARNING)
    return SimpleNamespace(model=model, iter=0, logger=logging.getLogger('test_hooks'),
                           message_hub=MessageHub.get_instance('test_hooks'))


def iterate(hook, runner):
    hook.before_train_iter(runner, 0)
    runner.model(torch.rand(2, 3, 16, 16))
    hook.after_train_iter(runner, 0)
    runner.iter += 1


def test_warns_once_when_the_stem_is_lost(runner, caplog):
    hook = StemSignalHook(interval=1)
    hook.before_train(runner)
    iterate(hook, runner)
    assert runner.message_hub.get_scalar('train/stem_signal').current() > 0.5
    assert not caplog.messages

    nn.init.normal_(runner.model[0].bias, std=30)  # as an unclipped step throws it
    for _ in range(2):
        iterate(hook, runner)
    assert runner.message_hub.get_scalar('train/stem_signal').current() < 0.01
    message, = caplog.messages
    assert 'at iteration 2 ' in message and 'clip_grad=dict(max_norm=1)' in message
    assert not runner.model[0]._forward_hooks


def test_measures_every_interval_alone(runner):
    hook, seen = StemSignalHook(interval=3), []
    hook._measure = lambda *args: (seen.append(runner.iter + 1),
                                   StemSignalHook._measure(hook, *args))[1]
    hook.before_train(runner)
    for _ in range(7):
        iterate(hook, runner)
    assert seen == [3, 6]


def test_leaves_other_models_alone(runner):
    runner.model = nn.Conv2d(3, 4, 1)
    hook = StemSignalHook(interval=1)
    hook.before_train(runner)
    iterate(hook, runner)
    assert hook.share is None


def test_a_compiled_model_trains_on(runner):
    model, runner.model = runner.model, torch.compile(runner.model, backend='eager')
    runner.model(torch.rand(2, 3, 16, 16))  # compiled before the hook comes
    hook = StemSignalHook(interval=1)
    hook.before_train(runner)
    for _ in range(2):
        iterate(hook, runner)
    assert not model[0]._forward_hooks


def test_bad_arguments():
    for kwargs in (dict(interval=0), dict(threshold=1), dict(threshold=-.1)):
        with pytest.raises(ValueError, match='interval must be at least 1 and threshold in'):
            StemSignalHook(**kwargs)
