"""torchrun with processes on the CPU: training, evaluation, a killed process, sharded weights."""
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dist import init_dist
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from program import ROOT
from short_training import CONFIG, SHORT
from toy_cityscapes import generate

from mmseg_kn.engine import launch
from mmseg_kn.fsdp import FSDPOptimWrapper

RIG = '''
import json, os, signal
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

if not os.environ.get('SINGLE'):
    torch.set_default_dtype(torch.float64)

@HOOKS.register_module()
class Rig(Hook):
    """Writes each process's losses; kills process 1 after as many iterations as asked."""

    losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs['loss'].item())
        with open(f'{runner.work_dir}/rank{runner.rank}.json', 'w') as file:
            json.dump(dict(pid=os.getpid(), losses=self.losses), file)
        if runner.rank == 1 and os.environ.get('KILL_AFTER') == str(len(self.losses)):
            os.kill(os.getpid(), signal.SIGKILL)
'''
# Nothing random but the order of the images, which the seed sets; it is dealt out in turn.
EXACT = f'''
_base_ = '{CONFIG}'
custom_imports = dict(imports=['mmseg_kn', 'rig'], allow_failed_imports=False)
custom_hooks = [dict(type='StemSignalHook'), dict(type='Rig')]
conv_cfg = dict(type='KNConv', dropout_p=0.)
data_preprocessor = dict(mean=[0.] * 3, std=[255.] * 3)  # not whole numbers: float64
model = dict(data_preprocessor=data_preprocessor,
             backbone=dict(dropout_p=0.),
             decode_head=dict(conv_cfg=conv_cfg, dropout_ratio=0.),
             auxiliary_head=dict(conv_cfg=conv_cfg, dropout_ratio=0.))
train_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(48, 32)), dict(type='PackSegInputs')]))
default_hooks = dict(checkpoint=dict(save_optimizer=False))
env_cfg = dict(dist_cfg=dict(backend='gloo'))
'''


@pytest.fixture(scope='module')
def rig(tmp_path_factory):
    """A folder with scenes, an exact config, initial weights and 2 iterations of one process."""
    folder = tmp_path_factory.mktemp('rig')
    generate(folder / 'scenes', train=4, val=3, size=(64, 96))  # 3: two processes pad to 4
    (folder / 'rig.py').write_text(RIG)
    (folder / 'config.py').write_text(EXACT)
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(CONFIG).model)
    torch.save(dict(state_dict=model.state_dict()), folder / 'weights.pth')
    run(folder, [sys.executable, ROOT / 'tools/train.py', folder / 'config.py'], 'one',
        'train_dataloader.batch_size=4')
    return folder


def options(folder):
    roots = [f'{split}_dataloader.dataset.data_root={folder}/scenes'
             for split in ('train', 'val', 'test')]
    return [*SHORT, *roots, 'train_cfg.max_iters=2', 'train_cfg.val_interval=2',
            'model.data_preprocessor.size=(32,48)', 'optim_wrapper.optimizer.lr=0.01',
            f'load_from={folder}/weights.pth']


def run(folder, command, name, *more, check=True, **env):
    """Runs a program on a free port; what it printed, and its exit status."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    command = [*map(str, command), '--work-dir', str(folder / name), '--cfg-options',
               *options(folder), *more]
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    done = subprocess.run(command, cwd=folder, text=True, timeout=300, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=dict(
                              os.environ, PYTHONPATH=f'{ROOT}:{folder}', OMP_NUM_THREADS='1',
                              PATH=path, PORT=str(port), **env))
    assert not check or done.returncode == 0, f'{shlex.join(command)}\n{done.stdout[-4000:]}'
    return done


def miou(folder, name):
    files = (folder / name).glob('*/vis_data/scalars.json')
    found, = (json.loads(line)['mIoU'] for file in files for line in file.open()
              if 'mIoU' in line)
    return found


def losses(folder, name, processes):
    """(processes, 2)"""
    files = [folder / name / f'rank{rank}.json' for rank in range(processes)]
    return torch.tensor([json.loads(file.read_text())['losses'][:2] for file in files],
                        dtype=torch.float64)


def trained(folder, name):
    return torch.load(folder / name / 'iter_2.pth', weights_only=False)['state_dict']


def assert_same(folder, name, processes):
    """Losses, weights and mIoU of some processes are those of one with all the images."""
    each = losses(folder, name, processes)
    # mmseg adds float32's eps, 1.2e-7, to the number of pixels that it divides by.
    torch.testing.assert_close(each.mean(0), losses(folder, 'one', 1)[0], atol=0, rtol=1e-9)
    assert not torch.equal(each[0], each[1])  # each saw images of its own
    expected, initial = trained(folder, 'one'), torch.load(folder / 'weights.pth')['state_dict']
    assert (expected['backbone.stem.weight'] - initial['backbone.stem.weight']).abs().max() > 1e-4
    assert expected['backbone.stem.weight'].dtype == torch.float64
    torch.testing.assert_close(dict(trained(folder, name)), dict(expected), atol=1e-13, rtol=0)
    assert miou(folder, name) == miou(folder, 'one') > 0


def test_four_processes_train_as_one(rig):
    run(rig, ['bash', ROOT / 'tools/dist_train.sh', rig / 'config.py', 4], 'four',
        'train_dataloader.batch_size=1')
    assert_same(rig, 'four', 4)


def test_two_processes_train_as_one_until_one_is_killed(rig):
    """In the third step process 0 waits for process 1, which is gone; run() would time out."""
    done = run(rig, ['bash', ROOT / 'tools/dist_train.sh', rig / 'config.py', 2], 'two',
               'train_dataloader.batch_size=2', 'train_cfg.max_iters=4', check=False,
               KILL_AFTER='3')
    assert_same(rig, 'two', 2)
    assert done.returncode != 0 and 'SIGKILL' in done.stdout and 'FAILED' in done.stdout
    assert not (rig / 'two/iter_4.pth').exists()
    for rank in range(2):
        pid = json.loads((rig / f'two/rank{rank}.json').read_text())['pid']
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processes_evaluate_as_one(rig):
    """Three images on two processes: the one that is dealt out twice counts once."""
    done = run(rig, ['bash', ROOT / 'tools/dist_test.sh', rig / 'config.py',
                     rig / 'one/iter_2.pth', 2], 'test')
    assert re.search(r'Iter\(test\) \[2/2\]', done.stdout)
    files = (rig / 'test').glob('*/*.json')
    found, = (json.loads(file.read_text())['mIoU'] for file in files)
    assert found == miou(rig, 'one')


SHARDED = '''
_base_ = 'config.py'
custom_hooks = [dict(type='StemSignalHook'), dict(type='ClassCheckHook'), dict(type='Rig')]
runner_type = 'FlexibleRunner'
strategy = dict(
    type='mmseg_kn.fsdp.ResumableFSDPStrategy',
    model_wrapper=dict(type='MMFullyShardedDataParallel', device_id='cpu',
                       auto_wrap_policy=dict(type='mmseg_kn.fsdp.wrap_blocks')),
    state_dict_cfg=dict(
        state_dict_type='FULL_STATE_DICT',
        state_dict_config=dict(type='FullStateDictConfig', rank0_only=True),
        optim_state_dict_config=dict(type='FullOptimStateDictConfig', rank0_only=True)))
optim_wrapper = dict(type='mmseg_kn.fsdp.FSDPOptimWrapper')
'''


def test_sharded_processes_train_as_one(rig):
    """In float32, since FSDP takes no norm of float64: the steps agree to its rounding.

    Were each shard clipped by its own norm, they would be tens of percent longer.
    """
    (rig / 'sharded.py').write_text(SHARDED)
    run(rig, ['bash', ROOT / 'tools/dist_train.sh', rig / 'sharded.py', 2], 'sharded',
        'train_dataloader.batch_size=2', SINGLE='1')
    torch.testing.assert_close(losses(rig, 'sharded', 2).mean(0), losses(rig, 'one', 1)[0],
                               atol=0, rtol=1e-4)
    expected, initial = trained(rig, 'one'), torch.load(rig / 'weights.pth')['state_dict']
    found = trained(rig, 'sharded')
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        step = (weight - initial[name]).norm()
        assert (found[name] - weight).norm() <= 0.02 * step and step > 0, name
    assert miou(rig, 'sharded') == pytest.approx(miou(rig, 'one'), abs=0.02)


def test_sharded_processes_resume(rig):
    """With their momentum: the second step, resumed, is the same as the second of two."""
    (rig / 'sharded.py').write_text(SHARDED)
    command = ['bash', ROOT / 'tools/dist_train.sh', rig / 'sharded.py', 2]
    saving = ['train_dataloader.batch_size=2', 'default_hooks.checkpoint.interval=1',
              'default_hooks.checkpoint.save_optimizer=True',
              'optim_wrapper.optimizer.momentum=.9']
    run(rig, command, 'whole', *saving, SINGLE='1')
    log = run(rig, [*command, '--resume'], 'resumed', *saving, f'load_from={rig}/whole/iter_1.pth',
              SINGLE='1').stdout
    assert 'resumed epoch: 0, iter: 1' in log
    expected, found = trained(rig, 'whole'), trained(rig, 'resumed')
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7)


# Messages


def test_nccl_without_gpus_is_refused(monkeypatch):
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cpu')
    with pytest.raises(ValueError, match='add --cfg-options env_cfg.dist_cfg.backend=gloo'):
        init_dist('pytorch', backend='nccl')


def test_an_accelerator_is_left_to_mmengine(monkeypatch):
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cuda')
    called = []
    init = launch._init_dist_pytorch(lambda *args, **kwargs: called.append((args, kwargs)))
    init('nccl', timeout=1)
    assert called == [(('nccl', ), dict(timeout=1))]


def test_fsdp_optim_wrapper_refuses():
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1)
    with pytest.raises(ValueError, match="got a clip_grad of type 'value'"):
        FSDPOptimWrapper(optimizer, clip_grad=dict(type='value', clip_value=1))
    wrapper = FSDPOptimWrapper(optimizer, clip_grad=dict(max_norm=1))
    with pytest.raises(ValueError, match='clips sharded models, got Linear'):
        with wrapper.optim_context(net):
            pass
