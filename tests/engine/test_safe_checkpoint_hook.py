"""Checkpoints survive kills and full disks, and training goes on from the newest whole one.

tools/dev/kill_and_resume.py does the same to tools/train.py with twenty kills.
"""
import errno
import itertools
import logging
import os
import re
import resource
import runpy
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get_file_backend
from mmengine.model import BaseModel
from mmengine.registry import METRICS
from mmengine.runner import FlexibleRunner, Runner, save_checkpoint
from program import ROOT
from torch import nn

from mmseg_kn.checkpoints.safe_load import load_from_local
from mmseg_kn.engine.safe_checkpoint_hook import AtomicBackend, SafeCheckpointHook, damage_of

NUMBER = itertools.count()


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, x, mode='tensor'):
        y = self.layers(x)
        return dict(loss=y.square().mean()) if mode == 'loss' else y


@METRICS.register_module()
class Given(BaseMetric):
    """Figures that a test gives, one for each validation, in place of any that is measured."""

    figures = ()

    def process(self, data_batch, data_samples):
        self.results.append(None)

    def compute_metrics(self, results):
        figure = next(self.figures)
        return dict(a=figure, b=-figure)


def build(work_dir, iterations=6, resume=False, seeds=True, kind=Runner, val=False, by_epoch=False,
          **checkpoint):
    """A Runner that trains with momentum, a schedule and dropout, saving every two iterations.

    ``val``: it validates as often. ``by_epoch``: an epoch for every iteration.
    """
    data = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    loader = dict(batch_size=2, dataset=[dict(x=row) for row in data],
                  collate_fn=dict(type='default_collate'))
    order = dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True)
    cfg = dict(by_epoch=True, max_epochs=iterations) if by_epoch else dict(
        by_epoch=False, max_iters=iterations)
    options = dict(val_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=False)),
                   val_cfg=dict(), val_evaluator=dict(type='Given')) if val else {}
    torch.manual_seed(0)  # the Runner seeds when the model is there
    return kind(
        Model(), work_dir=str(work_dir), resume=resume,
        train_dataloader=dict(loader, sampler=order), train_cfg=dict(cfg, val_interval=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        param_scheduler=dict(type='PolyLR', end=10, by_epoch=False),
        default_hooks=dict(checkpoint=dict(type='SafeCheckpointHook', by_epoch=by_epoch,
                                           interval=2, **checkpoint)),
        custom_hooks=[dict(type='IterationSeedHook')] * seeds,
        randomness=dict(seed=0), experiment_name=f'resume_{next(NUMBER)}', **options)


def train(*args, **kwargs):
    runner = build(*args, **kwargs)
    runner.train()
    return Path(runner.work_dir)


def log(work):
    """What the trainings of a folder have logged."""
    return ''.join(path.read_text() for path in sorted(work.glob('*/*.log')))


def content(path):
    """Weights, momentum and schedule of a checkpoint."""
    file = load_from_local(str(path))
    return [file['meta']['iter'], file['param_schedulers'], *file['state_dict'].values(),
            *(s['momentum_buffer'] for s in file['optimizer']['state'].values())]


def same(one, other):
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b
               for a, b in zip(content(one), content(other), strict=True))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp('whole'))


@pytest.fixture
def work(whole, tmp_path):
    """A training of six iterations as it was left: iter_2, iter_4, iter_6, one second apart."""
    for number in (2, 4, 6):
        path = tmp_path / f'iter_{number}.pth'
        path.write_bytes((whole / path.name).read_bytes())
        os.utime(path, (1000 + number, 1000 + number))
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_6.pth'))
    return tmp_path


def point(work, caplog, **checkpoint):
    """What last_checkpoint names once a resumed run has begun."""
    caplog.set_level(logging.WARNING)
    runner = SimpleNamespace(work_dir=str(work), logger=logging.getLogger('test_resume'),
                             _resume=True, _load_from=None)
    SafeCheckpointHook(**{'by_epoch': False, **checkpoint}).before_run(runner)
    return Path((work / 'last_checkpoint').read_text())


# A checkpoint is whole or not there


def test_a_kill_while_writing_leaves_what_was_there(tmp_path):
    child = os.fork()
    if not child:  # killed in the middle of its second checkpoint
        try:
            calls = itertools.count(1)
            with mock.patch('os.fsync', lambda _: next(calls) == 2 and os.kill(
                    os.getpid(), signal.SIGKILL)):
                train(tmp_path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.glob('iter*')) == ['iter_2.pth', 'iter_4.pth.part']
    train(tmp_path, resume=True)
    assert sorted(p.name for p in tmp_path.glob('iter*')) == [f'iter_{i}.pth' for i in (2, 4, 6)]
    assert re.search(rf'WARNING - {tmp_path}/iter_4.pth.part was left by a training that was '
                     'killed', log(tmp_path))


def test_no_room(tmp_path):
    """RLIMIT_FSIZE stands for a full disk: a write that fails half way."""
    hook = SafeCheckpointHook(interval=1, by_epoch=False)
    runner = SimpleNamespace(
        work_dir=str(tmp_path), logger=logging.getLogger('test_resume'), model=Model(), iter=0,
        epoch=0, max_iters=9, val_loop=None, message_hub=mock.Mock(runtime_info={}))
    runner.train_loop = SimpleNamespace(max_iters=9)
    runner.save_checkpoint = lambda folder, name, *args, backend_args, **kwargs: save_checkpoint(
        dict(weight=torch.rand(10000)), f'{folder}/{name}', backend_args=backend_args)
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)
    before = (tmp_path / 'iter_1.pth').read_bytes()
    runner.iter = 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
        with pytest.raises(OSError, match=r'cannot be written \(File too large\); those before it '
                                          'are whole. Make room, .* go on with --resume'):
            hook.after_train_iter(runner, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.glob('*iter*')) == ['iter_1.pth']
    assert (tmp_path / 'iter_1.pth').read_bytes() == before and damage_of(
        tmp_path / 'iter_1.pth') is None
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_1.pth')


def test_a_folder_that_cannot_hold_checkpoints_is_told_at_the_start(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    runner = SimpleNamespace(work_dir=str(tmp_path / 'work'), model=Model(), val_loop=None,
                             logger=logging.getLogger('test_resume'))
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='cannot be written .*file'):
        SafeCheckpointHook(out_dir=str(tmp_path / 'file')).before_train(runner)
    with mock.patch('os.access', return_value=False), pytest.raises(PermissionError, match='room'):
        SafeCheckpointHook().before_train(runner)
    with mock.patch('shutil.disk_usage', return_value=SimpleNamespace(free=100)):
        SafeCheckpointHook().before_train(runner)
    assert 'room for 0 MiB' in caplog.text and 'checkpoint.out_dir' in caplog.text


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS])
def test_a_work_dir_that_cannot_be_written_is_one_line(number, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    from mmseg_script import run
    error = OSError(number, os.strerror(number), 'somewhere')
    with mock.patch.object(runpy, 'run_path', side_effect=error), \
            pytest.raises(SystemExit, match='must be writable .*somewhere.*--work-dir'):
        run('train.py')
    with mock.patch.object(runpy, 'run_path', side_effect=OSError(errno.ENOENT, 'a', 'b')), \
            pytest.raises(FileNotFoundError):
        run('train.py')


def test_the_oldest_goes_when_the_newest_is_there(tmp_path):
    runner = build(tmp_path, max_keep_ckpts=1)
    seen = []
    put = AtomicBackend.put

    def watched(self, obj, path):
        seen.append(sorted(p.name for p in tmp_path.glob('*.pth')))
        put(self, obj, path)

    with mock.patch.object(AtomicBackend, 'put', watched):
        runner.train()
    assert seen == [[], ['iter_2.pth'], ['iter_4.pth']]
    assert [p.name for p in tmp_path.glob('*.pth')] == ['iter_6.pth']


@pytest.mark.parametrize('save_best', ['a', ['a', 'b']])
def test_the_best_goes_when_a_better_one_is_there(save_best, tmp_path):
    runner = build(tmp_path, val=True, save_best=save_best, rule='greater')
    seen = []
    put = AtomicBackend.put

    def watched(self, obj, path):
        put(self, obj, path)
        seen.append(sorted(p.name for p in tmp_path.glob('best*')))

    with mock.patch.object(AtomicBackend, 'put', watched), \
            mock.patch.object(Given, 'figures', iter([1, 3, 2])):
        runner.train()
    first = ['best_b_iter_2.pth'] * (save_best != 'a')  # b, which is -a, was best at first
    assert ['best_a_iter_2.pth', 'best_a_iter_4.pth', *first] in seen
    assert sorted(p.name for p in tmp_path.glob('best*')) == ['best_a_iter_4.pth', *first]


def test_other_backends_are_left_alone(tmp_path):
    assert type(get_file_backend(tmp_path)).__name__ == 'LocalBackend'
    assert isinstance(get_file_backend(backend_args=dict(backend='atomic')), AtomicBackend)


# The newest whole one is found


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, (1006, 1006))


@pytest.mark.parametrize('damage', [cut, flip, lambda path: path.write_bytes(b'')])
def test_damage_is_named_and_skipped(damage, work, caplog):
    damage(work / 'iter_6.pth')
    assert damage_of(work / 'iter_6.pth')
    assert point(work, caplog) == work / 'iter_4.pth'
    assert f'{work / "iter_6.pth"} is damaged or half-written and is skipped' in caplog.text
    assert f'resuming from {work / "iter_4.pth"}' in caplog.text
    damage(work / 'iter_4.pth')
    assert point(work, caplog) == work / 'iter_2.pth'
    damage(work / 'iter_2.pth')
    with pytest.raises(ValueError, match='no checkpoint in .* is whole.*delete them to start'):
        point(work, caplog)


@pytest.mark.parametrize('text, expected', [
    ('', 6), ('iter_', 6), ('{work}/iter_4.pth', 6), ('/elsewhere/iter_4.pth', 6), (None, 6)])
def test_a_lost_or_stale_pointer(text, expected, work, caplog):
    pointer = work / 'last_checkpoint'
    if text is None:
        pointer.unlink()
    else:
        pointer.write_text(text.format(work=work))
    assert point(work, caplog) == work / f'iter_{expected}.pth'
    assert 'the newest that is whole' in caplog.text


def test_what_lies_beside_is_not_taken_for_newer(work, caplog):
    """A longer training of before, and times that copying has turned round."""
    os.utime(work / 'iter_6.pth', (1, 1))
    (work / 'last_checkpoint').write_text(str(work / 'iter_4.pth'))
    assert point(work, caplog) == work / 'iter_4.pth'
    for number in (2, 4, 6):
        os.utime(work / f'iter_{number}.pth', (9 - number, 9 - number))
    (work / 'last_checkpoint').write_text(str(work / 'iter_6.pth'))
    assert point(work, caplog) == work / 'iter_6.pth'
    assert not caplog.messages


def test_nothing_to_resume_from_is_left_to_mmengine(tmp_path, caplog):
    with pytest.raises(FileNotFoundError):
        point(tmp_path, caplog)  # there still is no last_checkpoint
    assert not caplog.messages


def test_checkpoints_of_epochs(work, caplog):
    for path in work.glob('iter_*.pth'):
        path.rename(work / path.name.replace('iter', 'epoch'))
    flip(work / 'epoch_6.pth')
    assert point(work, caplog, by_epoch=True) == work / 'epoch_4.pth'


def test_other_folder(work, caplog):
    other = work.parent / f'{work.name}_out' / work.name
    other.mkdir(parents=True)
    for path in work.glob('*.pth'):
        path.rename(other / path.name)
    cut(other / 'iter_6.pth')
    assert point(work, caplog, out_dir=str(other.parent)) == other / 'iter_4.pth'


def test_folders_are_not_judged(work, caplog):
    """Sharded checkpoints; a FlexibleRunner reads them."""
    (work / 'iter_8.pth').mkdir()
    os.utime(work / 'iter_8.pth', (1008, 1008))
    assert point(work, caplog) == work / 'iter_6.pth'
    (work / 'last_checkpoint').write_text(str(work / 'iter_8.pth'))
    assert point(work, caplog) == work / 'iter_8.pth'
    for number in (2, 4, 6):
        (work / f'iter_{number}.pth').unlink()
    assert point(work, caplog) == work / 'iter_8.pth'
    assert not caplog.messages


def test_compressed_members_are_not_unpacked(work):
    path = work / 'iter_6.pth'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a\x1b[31m/data.pkl', bytes(9999))
    with mock.patch.object(zipfile.ZipFile, 'testzip', side_effect=AssertionError('unpacked')):
        assert 'compressed' in damage_of(path)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a\x1b[31m/data.pkl', bytes(9999))
    flip(path)
    assert 'checksum of a?[31m/data.pkl' in damage_of(path)


# And training goes on as if nothing had happened


@pytest.mark.parametrize('damaged', [(), (6, ), (6, 4)])
def test_resumed_equals_uninterrupted(damaged, whole, work):
    longer = train(work.parent / f'{work.name}_longer', iterations=8)
    for number in damaged:
        cut(work / f'iter_{number}.pth')
    train(work, iterations=8, resume=True)
    assert same(work / 'iter_8.pth', longer / 'iter_8.pth')
    assert not same(work / 'iter_8.pth', whole / 'iter_6.pth')


def test_without_the_seed_hook_dropout_differs(tmp_path):
    whole = train(tmp_path / 'whole', iterations=4, seeds=False)
    train(tmp_path / 'resumed', iterations=2, seeds=False)
    train(tmp_path / 'resumed', iterations=4, seeds=False, resume=True)
    assert not same(whole / 'iter_4.pth', tmp_path / 'resumed/iter_4.pth')


@pytest.mark.parametrize('by_epoch', [False, True])
def test_a_training_resumed_at_its_end_validates(by_epoch, tmp_path):
    options = dict(iterations=4, val=True, by_epoch=by_epoch, save_best='a', rule='greater')
    said = 'resumed at its end; its last validation'
    with mock.patch.object(Given, 'figures', iter([1])), pytest.raises(StopIteration):
        train(tmp_path, **options)  # ends in its last validation
    kind = 'epoch' if by_epoch else 'iter'
    assert (tmp_path / f'{kind}_4.pth').exists() and said not in log(tmp_path)
    with mock.patch.object(Given, 'figures', iter([2])):
        train(tmp_path, resume=True, **options)
    assert said in log(tmp_path)
    assert [p.name for p in tmp_path.glob('best*')] == [f'best_a_{kind}_4.pth']
    # Before the end it is an ordinary training, and without validation nothing is validated.
    with mock.patch.object(Given, 'figures', iter([3])):
        train(tmp_path, resume=True, **dict(options, iterations=6))
    train(tmp_path, resume=True, **dict(options, iterations=6, val=False, save_best=None))
    assert log(tmp_path).count(said) == 1


def test_a_flexible_runner_has_resumed_when_the_hook_is_asked(tmp_path):
    train(tmp_path, iterations=4, kind=FlexibleRunner)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    train(tmp_path, resume=True, kind=FlexibleRunner)
    assert 'resumed epoch: 0, iter: 2' in log(tmp_path) and 'resuming' not in log(tmp_path)


def test_sharded_checkpoints_are_replaced_last(tmp_path):
    """Folders, as FSDP and DeepSpeed write them."""
    runner, seen = build(tmp_path, kind=FlexibleRunner, max_keep_ckpts=1), []

    def save(folder, name, *args, **kwargs):
        (tmp_path / name).mkdir()
        seen.append(sorted(p.name for p in tmp_path.glob('*.pth')))

    with mock.patch.object(runner, 'save_checkpoint', save):
        runner.train()
    assert seen == [['iter_2.pth'], ['iter_2.pth', 'iter_4.pth'], ['iter_4.pth', 'iter_6.pth']]
    assert [p.name for p in tmp_path.glob('*.pth')] == ['iter_6.pth']
