"""The classification configs as they are; test_classification_training.py trains them."""
import re

import pytest
import torch
from misc import paper_configs
from mmengine.config import Config
from mmengine.model import ImgDataPreprocessor
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, OPTIMIZERS, PARAM_SCHEDULERS
from program import ROOT
from torch import nn

from mmseg_kn import KNConvNeXt, KNResNetClassifier, KNResNetCls
from mmseg_kn.baselines import ResNetCls

CONFIG_DIR = ROOT / 'configs/classification'
CONFIGS = sorted(p.stem for p in CONFIG_DIR.glob('knresnet*.py') if '-dp-' not in p.stem)
CONVNEXT, = (p.stem for p in CONFIG_DIR.glob('knconvnext*.py'))
PRIVATE = sorted(p.stem for p in CONFIG_DIR.glob('*-dp-*.py'))
# The authors' recipes: learning rate, weight decay, epochs.
RECIPES = {
    '8xb32_in1k': (0.1, 1e-4, 100),
    '1xb32_cifar100': (0.05, 5e-4, 150),
    '1xb2_cifar100': (0.0015625, 5e-4, 150),
}


def load(name):
    return Config.fromfile(CONFIG_DIR / f'{name}.py')


def named(transforms, name):
    return next(t for t in transforms if t.type == name)


def test_there_are_configs():
    assert {name.split('_', 1)[1] for name in CONFIGS} == set(RECIPES)


@pytest.mark.parametrize('name', CONFIGS)
def test_runs_under_mmpretrain_with_ours_imported(name):
    cfg = load(name)
    assert cfg.custom_imports == dict(imports=['mmseg_kn'], allow_failed_imports=False)
    assert cfg.default_scope == 'mmpretrain'
    assert cfg.custom_hooks == [dict(type='ChannelsLastHook', device='cuda')]


@pytest.mark.parametrize('name', CONFIGS)
def test_model(name):
    cfg = load(name)
    assert cfg.model.type == 'ImageClassifier'
    backbone = MODELS.build(cfg.model.backbone)
    assert isinstance(backbone, KNResNetCls)
    assert name.startswith(f'knresnet{backbone.depth}_')
    assert backbone.feat_dim == cfg.model.head.in_channels
    assert cfg.model.head.num_classes == (1000 if 'in1k' in name else 100)
    # The plain module takes the checkpoints: its backbone is this one.
    ours = KNResNetClassifier(backbone.depth, low_resolution='cifar' in name).backbone
    shapes = {k: v.shape for k, v in backbone.state_dict().items()}
    assert shapes == {k: v.shape for k, v in ours.state_dict().items()}


@pytest.mark.parametrize('name', [n for n in CONFIGS if n.startswith('knresnet18')])
def test_forward_at_the_size_of_the_crop(name):
    cfg = load(name)
    cifar = 'cifar' in name
    size = (named(cfg.train_pipeline, 'RandomCrop').crop_size if cifar else
            named(cfg.train_pipeline, 'RandomResizedCrop').scale)
    assert size == (32 if cifar else 224)
    torch.manual_seed(0)
    backbone = MODELS.build(cfg.model.backbone)
    y, = backbone(torch.rand(2, 3, size, size))
    assert y.shape == (2, cfg.model.head.in_channels, 3, 3)
    y.mean().backward()
    # mmengine's DistributedDataParallel expects a gradient for every parameter
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize('name', CONFIGS)
def test_schedule(name):
    cfg = load(name)
    recipe = name.split('_', 1)[1]
    lr, weight_decay, epochs = RECIPES[recipe]
    assert cfg.optim_wrapper == dict(
        type='OptimWrapper',
        optimizer=dict(type='SGD', lr=lr, momentum=0.9, weight_decay=weight_decay))
    assert cfg.train_dataloader.batch_size == int(recipe.split('xb')[1].split('_')[0])
    assert cfg.train_cfg == dict(by_epoch=True, max_epochs=epochs, val_interval=1)

    # What torch's own schedulers, as the authors call them, give each epoch.
    def optimizer():
        return OPTIMIZERS.build(dict(
            cfg.optim_wrapper.optimizer, params=[torch.nn.Parameter(torch.zeros(1))]))

    mine, authors = optimizer(), optimizer()
    assert cfg.param_scheduler.by_epoch
    scheduler = PARAM_SCHEDULERS.build(dict(cfg.param_scheduler, optimizer=mine))
    if 'in1k' in name:
        reference = torch.optim.lr_scheduler.StepLR(authors, 30, 0.1)
    else:
        reference = torch.optim.lr_scheduler.CosineAnnealingLR(authors, epochs, 0.01 * lr)
    for _ in range(epochs):
        assert mine.param_groups[0]['lr'] == pytest.approx(authors.param_groups[0]['lr'], rel=1e-9)
        for part in (mine, authors, scheduler, reference):
            part.step()


@pytest.mark.parametrize('name', CONFIGS)
def test_data(name):
    cfg = load(name)
    cifar = 'cifar' in name
    # CIFAR is read as RGB, image files as BGR. The rest of the arguments mmengine's shares.
    arguments = dict(cfg.data_preprocessor)
    assert arguments.pop('to_rgb') is not cifar
    images = [torch.full((3, 2, 2), value, dtype=torch.uint8) for value in (0, 51, 255)]
    inputs = ImgDataPreprocessor(**arguments)(dict(inputs=images))['inputs']
    assert inputs.amin((1, 2, 3)).tolist() == pytest.approx([0, 0.2, 1])
    assert inputs.amax((1, 2, 3)).tolist() == pytest.approx([0, 0.2, 1])

    train, test = cfg.train_dataloader, cfg.val_dataloader
    assert cfg.test_dataloader == test
    assert train.dataset.type == test.dataset.type == ('CIFAR100' if cifar else 'ImageNet')
    assert train.dataset.data_root == test.dataset.data_root
    assert (train.dataset.split, test.dataset.split) == ('train', 'test' if cifar else 'val')
    assert (train.sampler.shuffle, test.sampler.shuffle) == (True, False)
    assert named(train.dataset.pipeline, 'RandomFlip').prob == 0.5
    if cifar:
        assert named(train.dataset.pipeline, 'RandomCrop').padding == 4
        assert [t.type for t in test.dataset.pipeline] == ['PackInputs']
    else:
        resize = named(test.dataset.pipeline, 'ResizeEdge')
        assert (resize.scale, resize.edge) == (256, 'short')
        assert named(test.dataset.pipeline, 'CenterCrop').crop_size == 224
    assert cfg.val_evaluator == dict(type='Accuracy', topk=(1, 5))


# KNConvNeXt


def test_the_recipe_of_convnext_is_the_authors():
    cfg = load(CONVNEXT)
    backbone = MODELS.build(cfg.model.backbone)
    assert isinstance(backbone, KNConvNeXt) and cfg.model.head.in_channels == backbone.feat_dim
    assert cfg.train_dataloader.batch_size == 256 and cfg.train_cfg.max_epochs == 600
    assert cfg.train_dataloader.sampler == dict(
        type='RepeatAugSampler', num_repeats=4, shuffle=True)
    train, test = cfg.train_dataloader.dataset.pipeline, cfg.test_dataloader.dataset.pipeline
    assert named(train, 'RandomResizedCrop').scale == 176
    assert (named(test, 'ResizeEdge').scale, named(test, 'CenterCrop').crop_size) == (232, 224)
    assert len(named(train, 'RandAugment').policies) == 14
    assert named(train, 'RandomErasing').erase_prob == 0.1
    assert [(a.type, a.alpha) for a in cfg.model.train_cfg.augments] == [
        ('Mixup', 0.2), ('CutMix', 1.0)]
    assert cfg.model.head.loss.label_smooth_val == 0.1

    wrapper = build_optim_wrapper(backbone, cfg.optim_wrapper)
    decays = {id(p): group['weight_decay'] for group in wrapper.param_groups
              for p in group['params']}
    norms = {id(p) for m in backbone.modules() if isinstance(m, nn.LayerNorm)
             for p in m.parameters()}
    assert all(decays[id(p)] == (0 if id(p) in norms else 0.05) for p in backbone.parameters())

    # What torch's schedulers, as torchvision's script calls them, give each epoch.
    def optimizer():
        return torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.001)

    mine, theirs = optimizer(), optimizer()
    schedulers = [PARAM_SCHEDULERS.build(dict(s, optimizer=mine)) for s in cfg.param_scheduler]
    lr_scheduler = torch.optim.lr_scheduler
    reference = lr_scheduler.SequentialLR(theirs, [
        lr_scheduler.LinearLR(theirs, 0.01, total_iters=5),
        lr_scheduler.CosineAnnealingLR(theirs, 595)], [5])
    for epoch in range(600):
        rate = mine.param_groups[0]['lr']
        # mmengine's warm-up arrives an epoch earlier.
        assert rate == pytest.approx(theirs.param_groups[0]['lr'], rel=1e-6, abs=1e-9) or epoch < 5
        for part in (mine, theirs, *schedulers, reference):
            part.step()
    # The weight of the average after an epoch is torchvision's.
    _, hook = cfg.custom_hooks
    assert hook.momentum == pytest.approx((1 - 0.99998) * 4 * 256 * 32 / 600, rel=3e-3)
    assert hook.interval == 32


# Private training: Table 4 of the paper.


def test_there_are_private_configs():
    assert PRIVATE == ['knresnet18_1xb512-dp-eps8_cifar10'] + [
        f'{network}_1xb8192-dp-eps8_imagenet32x32'
        for network in ('knresnet18', 'resnet18-gn', 'resnet18-ln')]


@pytest.mark.parametrize('name', PRIVATE)
def test_private_settings_are_the_authors(name):
    cfg = load(name)
    assert cfg.custom_imports.imports == ['mmseg_kn', 'mmseg_kn.privacy', 'mmseg_kn.baselines']
    assert cfg.default_scope == 'mmpretrain' and dict(type='DPHook') in cfg.custom_hooks
    assert dict(type='ChannelsLastHook', device='cuda') in cfg.custom_hooks
    table4 = 'imagenet32' in name
    items, batch = (1_281_167, 8192) if table4 else (50_000, 512)
    epochs, iterations = (100, items // batch) if table4 else (50, items // batch)
    assert cfg.train_dataloader.batch_size == batch
    assert cfg.train_dataloader.batch_sampler == dict(type='PoissonBatchSampler')
    assert cfg.train_cfg.type == 'DPIterBasedTrainLoop'
    assert cfg.train_cfg.max_iters == epochs * iterations
    assert cfg.train_cfg.max_iters % cfg.train_cfg.val_interval == 0
    assert cfg.train_cfg.max_iters % cfg.default_hooks.checkpoint.interval == 0
    wrapper = cfg.optim_wrapper
    assert (wrapper.target_epsilon, wrapper.accountant) == (8, 'rdp')
    assert (wrapper.target_delta, wrapper.max_grad_norm) == ((8e-7, 2) if table4 else (1e-5, 1))
    # neither momentum nor weight decay
    assert wrapper.optimizer == dict(type='SGD', lr=4. if table4 else 1.)
    assert cfg.param_scheduler == dict(
        type='MultiStepLR', by_epoch=False, gamma=0.5,
        milestones=[70 * 156, 90 * 156] if table4 else [4850])
    # no augmentation, and statistics of ImageNet for the twins alone
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        assert [step.type for step in loader.dataset.pipeline] == ['PackInputs']
        assert loader.dataset.type == ('ImageNet32' if table4 else 'CIFAR10')
    assert (cfg.data_preprocessor.std == [255] * 3) == name.startswith('kn')

    torch.manual_seed(0)
    backbone = MODELS.build(cfg.model.backbone)
    assert isinstance(backbone, KNResNetCls if name.startswith('kn') else ResNetCls)
    backbone.init_weights()
    mish = [m for m in backbone.modules() if isinstance(m, nn.Mish)]
    assert mish and not any(isinstance(m, nn.ReLU) for m in backbone.modules())
    conv = backbone.layer3[1].conv1
    limit = conv.weight[0].numel() ** -0.5  # torch's default: uniform
    assert conv.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.02)
    assert conv.weight.abs().max() <= limit
    if name.startswith('kn'):
        assert (backbone.stem.dropout_p, backbone.norm.dropout_p) == (0.05, 0.25)
    else:
        groups = {m.num_groups for m in backbone.modules() if isinstance(m, nn.GroupNorm)}
        assert groups == {32 if '-gn' in name else 1}
    with torch.no_grad():
        y, = backbone(torch.rand(1, 3, 32, 32))
    assert y.shape[1] == cfg.model.head.in_channels


# Tables 1 and 2 of the paper: configs that a program writes.


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp('paper')
    return {path.stem: Config.fromfile(path) for path in paper_configs.write(folder, [1, 2])}


def test_every_cell_is_written_by_its_name(written):
    networks = [network for depth in (18, 34, 50) for network in (
        f'knresnet{depth}', *(f'resnet{depth}-{norm}' for norm in ('bn', 'gn', 'ln')))]
    cifar100 = ['1xb2_cifar100', '1xb32_cifar100', '1xb256_cifar100']
    cells = {f'{network}_{data}' for network in networks for data in (*cifar100, '8xb32_in1k')}
    cells |= {f'preact{network}_{data}' for network in networks if 'kn' not in network
              for data in cifar100}
    assert set(written) == cells and len(cells) == 63 + 12


def test_those_of_kernel_norm_are_the_configs_of_the_repository(written):
    for name in CONFIGS:
        mine, theirs = written[name], load(name)
        assert dict(mine) == dict(theirs), name


def test_twins_have_the_authors_settings(written):
    rates = {name: cfg.optim_wrapper.optimizer.lr for name, cfg in written.items()}
    for name, rate in {
            'knresnet50_1xb32_cifar100': .025, 'knresnet34_1xb256_cifar100': .2,
            'resnet18-bn_1xb2_cifar100': .00078125, 'resnet34-bn_1xb256_cifar100': .1,
            'resnet18-bn_1xb256_cifar100': .2, 'resnet18-gn_1xb256_cifar100': .1,
            'resnet50-gn_1xb32_cifar100': .0125, 'resnet18-ln_1xb32_cifar100': .0125,
            'resnet18-ln_1xb256_cifar100': .05, 'resnet50-ln_1xb2_cifar100': .00078125,
            'preactresnet34-bn_1xb2_cifar100': .000390625,
            'preactresnet50-bn_1xb256_cifar100': .2, 'preactresnet50-gn_1xb32_cifar100': .025,
            'preactresnet50-ln_1xb2_cifar100': .0015625, 'resnet50-ln_8xb32_in1k': .1}.items():
        assert rates[name] == rate, name
    for name, cfg in written.items():
        depth = int(re.search(r'resnet(\d+)', name)[1])
        imagenet = 'in1k' in name
        size = re.search(r'xb(\d+)', name)[1]
        assert cfg.train_dataloader.batch_size == int(size)
        assert cfg.train_cfg.max_epochs == (100 if imagenet else 150)
        assert cfg.model.head.num_classes == (1000 if imagenet else 100)
        mean, std = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)) if imagenet else (
            (129.3105, 124.0575, 112.4295), (68.1615, 65.382, 70.431))
        if name.startswith('kn'):
            mean, std = [0] * 3, [255] * 3
        assert cfg.data_preprocessor.mean == pytest.approx(mean)
        assert cfg.data_preprocessor.std == pytest.approx(std)
        with torch.device('meta'):
            backbone = MODELS.build(cfg.model.backbone)
            x = torch.zeros(2, 3, *[96 if imagenet else 32] * 2)
            features, = backbone(x)
        assert backbone.depth == depth and features.shape[1] == cfg.model.head.in_channels
        if name.startswith('kn'):
            assert isinstance(backbone, KNResNetCls)
            assert backbone.stem.kernel_size == ((7, 7) if imagenet else (3, 3))
            continue
        assert features.shape[2:] == ((3, 3) if imagenet else (4, 4))
        stem = backbone.stem if name.startswith('preact') else backbone.conv1
        assert stem.kernel_size == ((7, 7) if imagenet else (3, 3))
        norms = [m for m in backbone.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
        groups = {'bn': None, 'gn': 32, 'ln': 1}[name.split('-')[1][:2]]
        assert all(getattr(norm, 'num_groups', None) == groups for norm in norms)
        assert name.startswith('preact') or not backbone.zero_init_residual
