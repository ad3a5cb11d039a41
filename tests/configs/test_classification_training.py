"""The classification configs in mmpretrain's hands: read, built and trained for a few steps."""
import pickle

import numpy as np
import pytest
import torch
from misc import paper_configs
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from PIL import Image
from pretrain import import_mmpretrain
from program import ROOT

from mmseg_kn import KNConvNeXtClassifier, KNResNetClassifier

CONFIG_DIR = ROOT / 'configs/classification'
PRIVATE = sorted(path.stem for path in CONFIG_DIR.glob('*-dp-*.py'))
PLAIN = sorted(path.stem for path in CONFIG_DIR.glob('knresnet*.py') if path.stem not in PRIVATE)
CONVNEXT, = (path.stem for path in CONFIG_DIR.glob('knconvnext*.py'))


@pytest.fixture(scope='module')
def mmpretrain():
    return import_mmpretrain()


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """The configs of Tables 1 and 2, which a program writes."""
    folder = tmp_path_factory.mktemp('paper')
    return {path.stem: Config.fromfile(path) for path in paper_configs.write(folder, [1, 2])}


def load(name):
    return Config.fromfile(CONFIG_DIR / f'{name}.py')


@pytest.fixture
def small_run(mmpretrain, tmp_path, monkeypatch):
    """A function: the config as it is, on 24 images in the files that its data set reads."""
    rng = np.random.default_rng(0)

    def pickled(path, label, classes, start=0):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps({
            'data': rng.integers(0, 256, (24, 3072), dtype=np.uint8),
            label: rng.integers(start, classes + start, 24).tolist()}))

    def small(cfg):
        kind = cfg.train_dataloader.dataset.type
        if kind == 'ImageNet':
            for split in ('train', 'val'):
                (tmp_path / split).mkdir()
                for i in range(24):
                    size = (int(rng.integers(40, 80)), 60, 3)  # of all shapes
                    Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(
                        tmp_path / split / f'{i}.jpeg')
                lines = [f'{i}.jpeg {rng.integers(1000)}' for i in range(24)]
                (tmp_path / 'meta').mkdir(exist_ok=True)
                (tmp_path / 'meta' / f'{split}.txt').write_text('\n'.join(lines))
        elif kind == 'ImageNet32':
            pickled(tmp_path / 'images', 'labels', 1000, start=1)
        else:
            from mmpretrain import datasets
            kind = getattr(datasets, kind)
            # The checksums are those of the published files.
            ten = kind is datasets.CIFAR10
            for files in ('train_list', 'test_list'):
                names = [name for name, _ in getattr(kind, files)]
                monkeypatch.setattr(kind, files, [[name, None] for name in names])
                for name in names:
                    pickled(tmp_path / kind.base_folder / name,
                            'labels' if ten else 'fine_labels', 10 if ten else 100)
        for split in ('train', 'val', 'test'):
            loader = cfg[f'{split}_dataloader']
            loader.dataset.data_root = str(tmp_path)
            if kind == 'ImageNet32':
                loader.dataset.pop('split')
                loader.dataset.files = ['images']
            loader.update(batch_size=8, num_workers=0, persistent_workers=False)
        cfg.work_dir = str(tmp_path / 'work')
        cfg.log_level = 'WARNING'
        cfg.experiment_name = tmp_path.name
        if cfg.train_cfg.get('by_epoch'):
            cfg.train_cfg.max_epochs = 1
            cfg.train_dataloader.num_batch_per_epoch = 2
        return cfg

    return small


def train(cfg):
    torch.manual_seed(0)
    cfg.custom_hooks[0].device = None  # feature maps in channels_last, as on a GPU
    runner = Runner.from_cfg(cfg)
    runner.train()
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert 'accuracy/top1' in str(runner.message_hub.log_scalars.keys())
    return runner


@pytest.mark.parametrize('name', PLAIN)
def test_mmpretrain_builds_it_and_shares_our_checkpoints(name, mmpretrain):
    cfg = load(name)
    init_default_scope('mmpretrain')
    theirs = mmpretrain.registry.MODELS.build(cfg.model).eval()
    ours = KNResNetClassifier(cfg.model.backbone.depth, cfg.model.head.num_classes,
                              'cifar' in name).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(1, 3, *[32 if 'cifar' in name else 96] * 2)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, mode='tensor'), ours(x))


def test_each_network_of_the_tables_takes_a_step_and_predicts(written, mmpretrain):
    init_default_scope('mmpretrain')
    for name, cfg in written.items():
        if '1xb2_' not in name and '_in1k' not in name:
            continue  # another batch size of the same network
        torch.manual_seed(0)
        model = mmpretrain.registry.MODELS.build(cfg.model)
        model.init_weights()
        x = torch.rand(2, 3, *[96 if 'in1k' in name else 32] * 2)
        samples = [mmpretrain.structures.DataSample().set_gt_label(i) for i in range(2)]
        loss = model(x, samples, mode='loss')['loss']
        loss.backward()
        assert loss.isfinite() and all(
            p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), name
        model.eval()
        with torch.no_grad():
            scores = [sample.pred_score for sample in model(x, samples, mode='predict')]
        assert all(s.isfinite().all() and len(s) == cfg.model.head.num_classes for s in scores)


@pytest.mark.parametrize('name', ['knresnet18_1xb2_cifar100', 'preactresnet18-ln_1xb256_cifar100',
                                  'knresnet18_8xb32_in1k'])
def test_training_runs(name, written, small_run, tmp_path):
    train(small_run(written[name].copy()))
    assert (tmp_path / 'work/epoch_1.pth').exists()


def test_the_recipe_of_convnext_trains(small_run):
    cfg = small_run(load(CONVNEXT))
    cfg.model.backbone.arch = dict(depths=[1] * 4, channels=(8, 16, 24, 768))
    cfg.custom_hooks[1].interval = 1
    runner = train(cfg)
    # The plain module takes its checkpoints.
    net = KNConvNeXtClassifier(cfg.model.backbone.arch)
    net.load_state_dict(runner.model.state_dict())


@pytest.mark.parametrize('name', PRIVATE)
def test_private_training_runs(name, small_run, tmp_path):
    cfg = small_run(load(name))
    cfg.train_cfg.update(max_iters=2, val_interval=2, max_physical_batch_size=8)
    cfg.custom_hooks[0].device = None  # channels_last
    cfg.default_hooks.checkpoint.interval = 2
    torch.manual_seed(0)
    runner = Runner.from_cfg(cfg)
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    runner.train()
    assert 0 < runner.optim_wrapper.epsilon() <= 8
    assert not torch.equal(before['head.fc.weight'], runner.model.head.fc.weight)
    assert 'accuracy/top1' in str(runner.message_hub.log_scalars.keys())
    saved = CheckpointLoader.load_checkpoint(str(tmp_path / 'work/iter_2.pth'))
    items = 5 * 24 if 'cifar10' in name else 24
    assert saved['meta']['privacy']['history']
    assert saved['meta']['privacy']['num_items'] == items
    if name.startswith('kn'):
        net = KNResNetClassifier(18, cfg.model.head.num_classes, low_resolution=True,
                                 activation='mish')
        net.load_state_dict(saved['state_dict'])
