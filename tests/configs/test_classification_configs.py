"""The pretraining configs, as far as they go without mmpretrain."""
import pytest
import torch
from mmengine.config import Config
from mmengine.model import ImgDataPreprocessor
from mmengine.registry import MODELS, OPTIMIZERS, PARAM_SCHEDULERS, init_default_scope
from program import ROOT

from mmseg_kn import KNResNetClassifier, KNResNetCls

CONFIG_DIR = ROOT / 'configs/classification'
CONFIGS = sorted(p.stem for p in CONFIG_DIR.glob('*.py'))
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


@pytest.mark.parametrize('name', CONFIGS)
def test_mmpretrain_builds_it_and_shares_our_checkpoints(name):
    pytest.importorskip('mmpretrain')
    from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
    cfg = load(name)
    init_default_scope('mmpretrain')
    theirs = MMPRETRAIN_MODELS.build(cfg.model).eval()
    ours = KNResNetClassifier(cfg.model.backbone.depth, cfg.model.head.num_classes,
                              'cifar' in name).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(1, 3, *[32 if 'cifar' in name else 96] * 2)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, mode='tensor'), ours(x))


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
