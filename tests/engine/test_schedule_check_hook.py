"""Schedules that mmengine follows without a word: a resumed one, and an epoch without end."""
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.optim import MultiStepLR, PolyLR
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from program import ROOT
from runners import tiny_runner
from torch import nn, optim
from torch.utils.data import BatchSampler, DataLoader

from mmseg_kn.engine import ScheduleCheckHook

HOOKS = [dict(type='ScheduleCheckHook')]


def train(runner):
    """What it warned of, and the learning rate at its end."""
    with mock.patch.object(runner.logger, 'warning') as warning:
        runner.train()
    said = [call.args[0] for call in warning.call_args_list]
    return [text for text in said if 'schedule of the checkpoint' in text], \
        runner.optim_wrapper.get_lr()['lr'][0]


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A training of two iterations, whose learning rate ends there."""
    work = tmp_path_factory.mktemp('schedule')
    assert train(tiny_runner(work, 2, end=2, custom_hooks=HOOKS))[0] == []
    return work


def test_a_longer_schedule_is_not_taken_up(work):
    """The message's remedy, to the letter, takes it up."""
    said, rate = train(tiny_runner(work, 6, end=8, resume=True, custom_hooks=HOOKS))
    assert rate == 0
    assert len(said) == 1 and ' end=2, not 8 and ' in said[0] and ' in PolyLR. ' in said[0]
    assert '--cfg-options load_from=CHECKPOINT' in said[0]
    said, rate = train(tiny_runner(work / 'again', 4, end=8, custom_hooks=HOOKS,
                                   load_from=str(work / 'iter_2.pth')))
    assert said == [] and rate == pytest.approx(0.01 * 3 / 7)


def test_the_same_schedule_is_resumed_silently(work):
    said, _ = train(tiny_runner(work, 4, end=2, resume=True, custom_hooks=HOOKS))
    assert said == []


def test_going_on_from_the_weights_that_a_config_starts_from(work, tmp_path):
    """Of mmengine's KeyError: 'epoch'; each remedy, to the letter."""
    weights = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=torch.load(work / 'iter_2.pth', weights_only=False)['state_dict']),
               weights)
    options = dict(custom_hooks=HOOKS, load_from=str(weights))
    runner = tiny_runner(tmp_path / 'new', 2, resume=True, **options)
    with pytest.raises(ValueError, match=rf'{weights} holds weights alone; to start a training '
                                         'from these weights take --cfg-options '
                                         rf'load_from={weights} without --resume$'):
        runner.train()
    tiny_runner(tmp_path / 'new', 2, **options).train()
    runner = tiny_runner(tmp_path / 'new', 4, resume=True, **options)
    with pytest.raises(ValueError, match=r'to go on from .*iter_2.pth add --cfg-options '
                                         'load_from=None; to start'):
        runner.train()
    options['load_from'] = DictAction._parse_iterable('None')
    runner = tiny_runner(tmp_path / 'new', 4, resume=True, **options)
    runner.train()
    assert runner.iter == 4

    (tmp_path / 'bare').mkdir()  # weights, as published, where a training has left its last ones
    (tmp_path / 'bare/last_checkpoint').write_text(str(weights))
    runner = tiny_runner(tmp_path / 'bare', 2, resume=True, custom_hooks=HOOKS)
    with pytest.raises(ValueError, match=rf'{weights} holds weights alone; to start .* take '
                                         rf'--cfg-options load_from={weights} without'):
        runner.train()


def test_going_on_from_another_checkpoint_than_the_last(work, tmp_path):
    """As mmengine has it, but not without a word."""
    tiny_runner(tmp_path, 3, custom_hooks=HOOKS).train()
    runner = tiny_runner(tmp_path, 4, resume=True, custom_hooks=HOOKS,
                         load_from=str(work / 'iter_2.pth'))
    with mock.patch.object(runner.logger, 'warning') as warning:
        runner.train()
    said, = (text for text in (call.args[0] for call in warning.call_args_list)
             if 'which load_from names' in text)
    assert f'goes on from {work / "iter_2.pth"}, ' in said
    assert f'not from {tmp_path / "iter_3.pth"}; ' in said
    assert 'iter_3.pth add --cfg-options load_from=None; ' in said


def warned(loop, sampler, batch_sampler=None, schedulers=None, loaded=None):
    loader = DataLoader([1, 2], batch_sampler=batch_sampler) if batch_sampler else \
        DataLoader([1, 2], sampler=sampler)
    runner = SimpleNamespace(train_dataloader=loader, train_loop=mock.Mock(spec=loop),
                             param_schedulers=schedulers, logger=mock.Mock())
    hook = ScheduleCheckHook()
    hook.before_run(runner)
    runner.param_schedulers = loaded or schedulers
    hook.before_train(runner)
    return ''.join(call.args[0] for call in runner.logger.warning.call_args_list)


@pytest.mark.parametrize('whole', [False, True])
def test_epochs_without_end(whole):
    endless, finite = InfiniteSampler([1, 2]), DefaultSampler([1, 2])
    for loop, sampler, wrong in ((EpochBasedTrainLoop, endless, True),
                                 (EpochBasedTrainLoop, finite, False),
                                 (IterBasedTrainLoop, endless, False)):
        text = warned(loop, sampler, BatchSampler(sampler, 1, False) if whole else None)
        assert ('train_dataloader.sampler.type=DefaultSampler' in text) == wrong


def test_several_optimizers_and_milestones():
    weights = optim.SGD(nn.Linear(1, 1).parameters(), lr=1.)
    short, long = (dict(a=[MultiStepLR(weights, milestones=milestones)],
                        b=[PolyLR(weights, eta_min=0.1)]) for milestones in ([2], [2, 9]))
    text = warned(IterBasedTrainLoop, InfiniteSampler([1, 2]), None, long, short)
    assert 'milestones=' in text and '9: 1' in text and ' in MultiStepLR. ' in text
    assert 'PolyLR' not in text


@pytest.mark.parametrize('settings', [
    None, dict(type='PolyLR', end=2), [dict(type='PolyLR', end=2)],
    dict(a=[dict(type='PolyLR')], b=dict(type='PolyLR'))])
def test_a_test_has_settings_in_place_of_schedulers(settings):
    hook = ScheduleCheckHook()
    hook.before_run(SimpleNamespace(param_schedulers=settings))
    assert hook.configured == []


@pytest.mark.parametrize('name', ['default', 'kernelized', 'dp'])
def test_it_is_in_the_shipped_runtimes(name):
    cfg = Config.fromfile(ROOT / f'configs/_base_/{name}_runtime.py')
    assert HOOKS[0] in cfg.custom_hooks
