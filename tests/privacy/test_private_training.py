"""Private training through mmengine's runner: what is refused, logged, saved and resumed."""
import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip('opacus')

from mmengine.config import Config  # noqa: E402
from mmengine.dataset import ClassBalancedDataset  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from mmseg.models.losses import BoundaryLoss, LovaszLoss, OhemCrossEntropy  # noqa: E402
from mmseg.registry import TRANSFORMS  # noqa: E402
from opacus.accountants import create_accountant  # noqa: E402
from program import ROOT, execute  # noqa: E402
from short_training import SHORT  # noqa: E402
from toy_cityscapes import generate  # noqa: E402

from mmseg_kn import KNConv2d  # noqa: E402
from mmseg_kn.privacy import DPIterBasedTrainLoop, DPOptimWrapper, PoissonBatchSampler  # noqa: E402
from mmseg_kn.privacy.checks import check_dataset, check_module, check_training  # noqa: E402

CONFIG = ROOT / ('configs/deeplabv3/'
                 'deeplabv3_knr18-d8_1xb32-dp-eps8-200_toy-cityscapes-128x256.py')
SIZE = (64, 96)
SMALL = [
    *SHORT, 'train_dataloader.batch_size=2', 'model.data_preprocessor.size=(64,96)',
    'model.backbone.out_indices=(0,1)', 'model.decode_head.in_channels=256',
    'model.decode_head.channels=8', 'model.decode_head.dilations=(1,2)',
    'model.auxiliary_head.in_channels=64', 'model.auxiliary_head.in_index=0',
    'model.auxiliary_head.channels=8', 'train_cfg.max_physical_batch_size=2',
    'optim_wrapper.accountant=rdp'
]


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp('scenes')
    generate(root, train=8, val=2, size=SIZE)
    return root


@pytest.fixture
def cfg(scenes, tmp_path):
    cfg = Config.fromfile(CONFIG)
    pairs = [option.split('=') for option in SMALL]
    cfg.merge_from_dict({key: eval(value) if value[0] in '(0123456789TF' else value
                         for key, value in pairs})
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(scenes)
    cfg.optim_wrapper.noise_multiplier = 1.0
    cfg.optim_wrapper.target_epsilon = None
    cfg.work_dir = str(tmp_path)
    cfg.log_level = 'WARNING'
    return cfg


def train(cfg):
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def repeat(kind, **kwargs):
    def change(cfg):
        cfg.train_dataloader.dataset = dict(type=kind, dataset=cfg.train_dataloader.dataset,
                                            **kwargs)
    return change


def twice(cfg):
    dataset = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='ConcatDataset',
                                        datasets=[dataset, copy.deepcopy(dataset)])


def plain_batches(cfg):
    del cfg.train_dataloader['batch_sampler']


def ordinary_loop(cfg):
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=4)


def ordinary_wrapper(cfg):
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=cfg.optim_wrapper.optimizer)


def in_a_slice(cfg):
    repeat('RepeatDataset', times=2)(cfg)
    cfg.train_dataloader.num_batch_per_epoch = 4


def by_other_paths(cfg):
    twice(cfg)
    second = cfg.train_dataloader.dataset.datasets[1]
    second.data_root = second.data_root + '/.'


def seeded_iterations(cfg):
    cfg.custom_hooks.append(dict(type='IterationSeedHook'))


def graphs(cfg):
    cfg.custom_hooks.append(dict(type='CudaGraphHook'))


def no_hook(cfg):
    cfg.custom_hooks = []


def loss(**kwargs):
    def change(cfg):
        cfg.model.decode_head.loss_decode = dict(cfg.model.decode_head.loss_decode, **kwargs)
    return change


def lovasz(cfg):
    cfg.model.decode_head.loss_decode = dict(type='LovaszLoss', reduction='none')


def setting(**kwargs):
    return lambda cfg: cfg.merge_from_dict({k.replace('__', '.'): v for k, v in kwargs.items()})


def batch_norm(cfg):
    cfg.model.decode_head.update(conv_cfg=None, norm_cfg=dict(type='BN'),
                                 act_cfg=dict(type='ReLU'))


REFUSED = {
    'BatchNorm': (batch_norm, r'decode_head.*statistics over the batch.*KNConv'),
    'avg_non_ignore': (loss(avg_non_ignore=True), 'avg_non_ignore=True.*CrossEntropyLoss'),
    'class_weight': (loss(class_weight=[1.] * 19), 'class_weight.*mean over samples'),
    'reduction': (loss(reduction='sum'), "no mean over samples .reduction='sum'"),
    'lovasz': (lovasz, 'per_image=False'),
    'ohem': (setting(model__decode_head__sampler=dict(type='OHEMPixelSampler', thresh=0.7)),
             'chooses its pixels.*sampler=None'),
    'no wrapper': (ordinary_wrapper, "OptimWrapper.*type='DPOptimWrapper'"),
    'no Poisson batches': (plain_batches, "BatchSampler.*type='PoissonBatchSampler'"),
    'ordinary loop': (ordinary_loop, "IterBasedTrainLoop.*type='DPIterBasedTrainLoop'"),
    'no hook': (no_hook, "custom_hooks=.dict.type='DPHook'"),
    'size_divisor': (setting(model__data_preprocessor__size_divisor=32,
                             model__data_preprocessor__size=None), 'size_divisor pads.*size='),
    'batch_augments': (setting(model__data_preprocessor__batch_augments=[]), 'batch_augments'),
    'RepeatDataset': (repeat('RepeatDataset', times=2), 'RepeatDataset.*several chances'),
    'MultiImageMixDataset': (repeat('MultiImageMixDataset', pipeline=[]), 'mixes images'),
    'slice': (in_a_slice, 'RepeatDataset.*several chances'),
    'paths': (by_other_paths, '8 of 16 items.*list every image once'),
    'IterationSeedHook': (seeded_iterations, 'repeat the dropout.*custom_hooks without it'),
    'CudaGraphHook': (graphs, 'call no hooks.*custom_hooks without it'),
    'twice': (twice, '8 of 16 items.*list every image once'),
    'with_cp': (setting(model__backbone__with_cp=True), 'with_cp=True.*max_physical_batch_size'),
    'activation_checkpointing': (setting(activation_checkpointing=['backbone']),
                                 'runs forward twice'),
    'compile': (setting(compile=True), 'compile=False'),
    'physical batch': (setting(train_cfg__max_physical_batch_size=0), 'at least 1 or None'),
}


class MixesSamples(nn.Conv2d):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class CountsImages(nn.Identity):
    def __init__(self):
        super().__init__()
        self.register_buffer('count', torch.zeros(()))

    def forward(self, x):
        self.count += len(x)
        return x


class Remembers(nn.Identity):
    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            self.mean += x.mean()
        return x


class SumLoss(nn.Module):
    loss_name = 'loss_sum'

    def forward(self, pred, target, weight=None, ignore_index=255, **kwargs):
        return nn.functional.cross_entropy(pred, target, ignore_index=255, reduction='sum') / 1e3


PROBED = {
    'layer': (lambda head: setattr(head, 'conv_seg', MixesSamples(8, 19, 1)),
              r'gradient of a sample changed by [\d.]+ %'),
    'buffer': (lambda head: setattr(head, 'dropout', CountsImages()),
               'changed decode_head.dropout.count'),
    'weight': (lambda head: setattr(head, 'dropout', Remembers()),
               'changed decode_head.dropout.mean'),
    'padding': (lambda head: setattr(head, 'conv_seg', nn.Conv2d(
        8, 19, 3, padding=1, padding_mode='circular')), 'add up to that of decode_head.conv_seg'),
    'loss': (lambda head: setattr(head, 'loss_decode', SumLoss()), 'is not the mean of theirs'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused(cfg, name):
    change, message = REFUSED[name]
    change(cfg)
    with pytest.raises(ValueError, match=message):
        train(cfg)


@pytest.mark.parametrize('name', PROBED)
def test_what_no_list_knows_is_found_by_the_probe(cfg, name):
    change, message = PROBED[name]
    cfg.train_dataloader.batch_size = 8  # the first batch has every image
    runner = Runner.from_cfg(cfg)
    change(runner.model.decode_head)
    with pytest.raises(ValueError, match=message):
        runner.train()


def frozen(norm):
    norm.requires_grad_(False)
    return norm


@pytest.mark.parametrize('module, message', [
    (nn.BatchNorm2d(4), 'statistics over the batch'),
    (nn.SyncBatchNorm(4), 'statistics over the batch'),
    (nn.BatchNorm2d(4, affine=False), 'statistics over the batch'),
    (nn.BatchNorm2d(4, affine=False, track_running_stats=False), 'statistics over the batch'),
    (frozen(nn.BatchNorm2d(4)), 'statistics over the batch'),
    (nn.InstanceNorm2d(4, track_running_stats=True), 'statistics over the batch, or keeps'),
    (nn.BatchNorm2d(4).eval(), 'trains weights beside buffers'),
    (OhemCrossEntropy(), 'chooses its pixels over the whole batch'),
    (LovaszLoss(reduction='none'), 'ranks pixels'),
    (BoundaryLoss(), 'counts the edges of the whole batch'),
], ids=lambda value: str(value)[:60])
def test_layers_and_losses_that_mix(module, message):
    with pytest.raises(ValueError, match=f'not private: x .*{message}'):
        check_module('x', module)


def test_what_does_not_mix_is_let_through():
    init_default_scope('mmseg')
    for module in (frozen(nn.BatchNorm2d(4)).eval(), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4),
                   *(MODELS.build(dict(type=f'mmseg.{kind}', **kwargs)) for kind, kwargs in (
                       ('CrossEntropyLoss', {}), ('DiceLoss', {}), ('TverskyLoss', {}),
                       ('LovaszLoss', dict(per_image=True))))):
        check_module('x', module)


def test_balanced_data_is_refused():
    # mmseg's data sets lack what the class is built with
    dataset = ClassBalancedDataset.__new__(ClassBalancedDataset)
    with pytest.raises(ValueError, match='ClassBalancedDataset gives an image several chances'):
        check_dataset(dataset)


def test_torchs_wrapper_of_several_processes_is_refused():
    """It would exchange gradients before they are clipped."""
    runner = SimpleNamespace(
        optim_wrapper=DPOptimWrapper.__new__(DPOptimWrapper),
        train_loop=DPIterBasedTrainLoop.__new__(DPIterBasedTrainLoop),
        train_dataloader=SimpleNamespace(
            batch_sampler=PoissonBatchSampler.__new__(PoissonBatchSampler)),
        distributed=True, model=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="not yet clipped.*type='MMDPDistributedDataParallel'"):
        check_training(runner)


def test_reverted_sync_bn_is_found():
    from mmengine.model import revert_sync_batchnorm
    net = revert_sync_batchnorm(nn.Sequential(nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4)))
    with pytest.raises(ValueError, match='statistics over the batch'):
        check_module('1', net[1])


def test_a_converted_network_trains(cfg):
    """A whole training, with the probe on its first batch, of what had BatchNorm."""
    norm = dict(type='BN')
    head = dict(conv_cfg=None, norm_cfg=norm, act_cfg=dict(type='ReLU'))
    cfg.model.backbone = dict(type='ResNetV1c', depth=18, stem_channels=8, base_channels=8,
                              norm_cfg=norm, num_stages=2, strides=(1, 2),
                              dilations=(1, 1), out_indices=(0, 1))
    cfg.model.decode_head.update(in_channels=16, **head)
    cfg.model.auxiliary_head.update(in_channels=8, **head)
    cfg.model = dict(type='KernelNormalized', model=cfg.model)
    cfg.train_dataloader.batch_size = 8  # the first batch has every image
    runner = train(cfg)
    assert runner.iter == 4
    assert sum(isinstance(m, KNConv2d) for m in runner.model.modules()) == 17
    assert 0 < runner.message_hub.get_scalar('train/epsilon').current() < float('inf')
    assert all(p.isfinite().all() for p in runner.model.parameters())


def log_of(folder):
    return '\n'.join(path.read_text() for path in sorted(folder.glob('*/*.log')))


@pytest.fixture(scope='module')
def options(scenes):
    roots = [f'{split}_dataloader.dataset.data_root={scenes}'
             for split in ('train', 'val', 'test')]
    return ['--cfg-options', *SMALL, *roots, 'randomness.seed=0']


def test_runs_resume_and_report(tmp_path, options, scenes):
    """Killed after its second iteration and resumed: the account is whole, the target met."""
    work = tmp_path / 'work'
    stop = tmp_path / 'stop_after_two.py'
    stop.write_text(
        'import os\nfrom mmengine.hooks import Hook\nfrom mmengine.registry import HOOKS\n'
        '@HOOKS.register_module()\nclass StopAfterTwo(Hook):\n'
        "    priority = 'VERY_LOW'\n"
        '    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):\n'
        '        if runner.iter == 1:\n            os._exit(9)\n')
    config = tmp_path / 'killed.py'
    config.write_text(
        f"_base_ = r'{CONFIG}'\n"
        "custom_imports = dict(imports=['mmseg_kn', 'mmseg_kn.privacy', 'stop_after_two'])\n"
        "custom_hooks = [dict(type='StemSignalHook'), dict(type='DPHook'), "
        "dict(type='StopAfterTwo')]\n")
    run = ['--work-dir', work, *options, 'train_cfg.val_interval=4']
    execute(ROOT / 'tools/train.py', config, *run, cwd=tmp_path, check=False, path=[tmp_path])
    assert (work / 'last_checkpoint').read_text().endswith('iter_2.pth')
    execute(ROOT / 'tools/train.py', CONFIG, *run, '--resume', cwd=tmp_path)

    log = log_of(work)
    assert 'differentially private training: noise multiplier' in log
    assert 'are not private' in log
    spent = [float(e) for e in re.findall(r'Iter\(train\).*epsilon: ([\d.]+)', log)]
    assert len(spent) == 4 and spent == sorted(spent) and 7.9 < spent[-1] <= 8
    checkpoint = torch.load(work / 'iter_4.pth', weights_only=False)
    state = checkpoint['meta']['privacy']
    [(sigma, rate, steps)] = state['history']
    assert (rate, steps, sigma) == (0.25, 4, state['noise_multiplier'])
    opacus_says = create_accountant('rdp')
    opacus_says.history = [(sigma, rate, steps)]
    assert opacus_says.get_epsilon(1e-5) == pytest.approx(spent[-1], abs=1e-4)
    logged = checkpoint['message_hub']['log_scalars']
    assert {name for name in logged if name.startswith('train/')} <= {
        'train/epsilon', 'train/lr', 'train/base_lr'}

    # the checkpoint is that of the plain config: its own tools take it
    plain = ROOT / 'configs/deeplabv3/deeplabv3_knr18-d8_1xb4-600_toy-cityscapes-128x256.py'
    keys = Config.fromfile(plain)
    keys.merge_from_dict({k: eval(v) for k, v in (o.split('=') for o in SMALL)
                          if k.startswith('model.')})
    from mmseg.registry import MODELS as SEGMENTORS
    init_default_scope('mmseg')
    assert list(SEGMENTORS.build(keys.model).state_dict()) == list(checkpoint['state_dict'])
    model_options = ['--cfg-options', *[o for o in options[1:] if o.startswith(
        ('model.', 'test_dataloader.'))]]
    log = execute(ROOT / 'tools/test.py', plain, work / 'iter_4.pth', *model_options,
                  cwd=tmp_path)
    assert 'mIoU' in log

    report = execute(ROOT / 'tools/analysis_tools/privacy_report.py', work / 'iter_4.pth',
                     cwd=tmp_path)
    assert f'{state["noise_multiplier"]:.4f}' in report and '0.25' in report
    assert f'{spent[-1]:.3f}' in report and 'one item of the training data' in report


def test_resuming_from_a_checkpoint_that_was_not_private(cfg):
    plain = copy.deepcopy(cfg)
    plain.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
    plain.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
    plain.custom_hooks = []
    plain.val_cfg = plain.val_dataloader = plain.val_evaluator = None
    plain_batches(plain)
    train(plain)
    cfg.resume, cfg.load_from = True, f'{cfg.work_dir}/iter_2.pth'
    with pytest.raises(ValueError, match='not trained privately.*load_from'):
        train(cfg)


@pytest.mark.parametrize('clipping', ['flat', 'ghost'])
def test_one_image_moves_a_segmentor_by_the_bound(cfg, clipping, monkeypatch):
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.optim_wrapper.update(noise_multiplier=0., max_grad_norm=0.01, clipping=clipping,
                             optimizer=dict(type='SGD', lr=1.0))
    cfg.train_cfg.max_iters, cfg.param_scheduler = 1, None
    monkeypatch.setattr(PoissonBatchSampler, '__iter__', lambda self: iter([[5], []]))
    runner = Runner.from_cfg(cfg)
    before = [p.detach().clone() for p in runner.model.parameters()]
    runner._init_model_weights = lambda: None
    runner.train()
    moved = sum((p.detach() - b).square().sum()
                for p, b in zip(runner.model.parameters(), before, strict=True)).sqrt()
    assert moved.item() == pytest.approx(0.01 / 2, rel=1e-3)  # of an expected batch of two


def test_repeated_indices_are_refused():
    with pytest.raises(ValueError, match='1 of 3 items'):
        check_dataset(torch.utils.data.Subset(range(5), [1, 2, 1]))


def test_repeatable_noise_is_no_protection(cfg, tmp_path):
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.optim_wrapper.noise_seed = 1
    cfg.train_cfg.max_iters = 2
    assert train(cfg).optim_wrapper.epsilon() == math.inf
    report = execute(ROOT / 'tools/analysis_tools/privacy_report.py', f'{cfg.work_dir}/iter_2.pth',
                     cwd=tmp_path)
    assert 'infinite: noise_seed was set' in report


def test_an_image_that_fails_is_not_replaced_by_another(cfg):
    cfg.train_dataloader.dataset.pipeline.insert(0, dict(type='NoImage'))
    cfg.train_dataloader.batch_size = 8
    with pytest.raises(Exception, match='Cannot find valid image after 0'):
        train(cfg)


@TRANSFORMS.register_module()
class NoImage:
    def __call__(self, results):
        return None


def test_an_empty_batch_in_training(cfg, monkeypatch):
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    monkeypatch.setattr(PoissonBatchSampler, '__iter__',
                        lambda self: iter([[], [], [3], [], [], []]))
    runner = train(cfg)
    assert runner.optim_wrapper.counter.history == [(1.0, 0.25, 4)]
    assert all(p.isfinite().all() for p in runner.model.parameters())
