"""The grid of configs, batch sizes and seeds, run as a user runs it."""
import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from program import ROOT, execute, load_tool
from torch.nn.modules.batchnorm import _BatchNorm
from toy_cityscapes import generate

from mmseg_kn import KNConv2d, KNResNet
from mmseg_kn.baselines import NoNorm, NormKNResNet, PlainPoolASPPHead

# isort: split
from mmseg.registry import MODELS

FOLDER = ROOT / 'tools/benchmarks'
TOOL = FOLDER / 'compare_norms.py'
SCHEDULE = '1xb2-400_camvid-160x160'
KN, BN = (f'deeplabv3_{name}-d8_{SCHEDULE}' for name in ('knr18', 'r18'))


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOL)


@pytest.fixture(scope='module')
def cells():
    return load_tool(FOLDER / 'norm_cells.py')


@pytest.fixture(scope='module')
def report():
    return load_tool(FOLDER / 'norm_report.py')


@pytest.fixture(scope='module')
def command(tmp_path_factory):
    """KN and BN at batch size 1, four iterations on four scenes."""
    folder = tmp_path_factory.mktemp('grid')
    generate(folder / 'scenes', train=4, val=1, size=(64, 128))
    options = ['train_cfg.max_iters=2', 'train_cfg.val_interval=1', 'param_scheduler.0.end=2',
               'default_hooks.checkpoint.interval=1', 'default_hooks.logger.interval=1']
    for split in ('train', 'val', 'test'):
        options += [f'{split}_dataloader.dataset.img_suffix=_leftImg8bit.png',
                    f'{split}_dataloader.num_workers=0',
                    f'{split}_dataloader.persistent_workers=False']
    return [sys.executable, TOOL, *(ROOT / f'configs/deeplabv3/{name}.py' for name in (KN, BN)),
            '--batch-sizes', '1', '--seeds', '3', '--jobs', '2', '--data-root', folder / 'scenes',
            '--work-dir', folder / 'work', '--cfg-options', *options]


def start(command):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    return subprocess.Popen([*map(str, command)], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


def test_a_grid_killed_and_run_again(command):
    work = Path(command[command.index('--work-dir') + 1])
    first = start(command)
    deadline = time.time() + 300
    while not list(work.glob('*/*/last_checkpoint')) and time.time() < deadline:
        time.sleep(.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    cell, = (work / KN).glob('b1_s3-*')
    assert (cell / 'iter_2.pth').exists() and not (cell / 'result.json').exists()

    log, _ = (second := start(command)).communicate()
    assert second.returncode == 0, log[-4000:]
    # twice the iterations at half the batch size, and none of them twice
    text = (cell / 'train.log').read_text()
    assert 'Iter(train) [4/4]' in text and 'resumed' in text
    assert text.count('Iter(train) [1/4]') == 1
    result = json.loads((cell / 'result.json').read_text())
    assert [step for step, _ in result['loss']] == [1, 2, 3, 4]
    assert result['miou'][-1][0] == 4
    cfg = Config.fromfile(cell / 'config.py')
    assert (cfg.optim_wrapper.optimizer.lr, cfg.param_scheduler[0].end) == (.015, 4)
    assert cfg.randomness == dict(seed=3)

    # the same as without a kill, which may cost a validation in between
    alone = [*command, '--work-dir', work.parent / 'alone']
    del alone[3]  # BatchNorm
    start(alone).communicate()
    whole, = (work.parent / 'alone' / KN).glob('b1_s3-*/result.json')
    whole = json.loads(whole.read_text())
    assert (whole['miou'][-1], whole['loss']) == (result['miou'][-1], result['loss'])

    # BatchNorm cannot train so, and the table says it
    table = (work / 'table.md').read_text()
    kn, bn = (next(row for row in table.splitlines() if name in row) for name in (KN, BN))
    assert f'| {result["miou"][-1][1]:.1f} |' in kn
    assert '| ValueError: Expected more than 1 value per channel' in bn
    assert table in log and 'batch 1, lr 0.015, seed 3: failed' in log
    assert cv2.imread(str(work / 'figures.png')).shape[1] > 1000
    with open(work / 'results.csv', newline='') as file:
        good, bad = csv.DictReader(file)
    assert (good['iterations'], good['torch'], bad['iterations']) == ('4', torch.__version__, '')
    assert good['validations'].split()[-1] == f'4:{result["miou"][-1][1]:.2f}'
    assert float(good['mIoU']) == result['miou'][-1][1]
    with open(work / 'table.csv', newline='') as file:
        assert [row['config'] for row in csv.DictReader(file)] == [KN, BN]

    before = {p: p.stat().st_mtime_ns for p in work.rglob('*.log')}
    log, _ = start(command).communicate()
    assert (work / 'table.md').read_text() == table and '(kept)' in log
    assert before == {p: p.stat().st_mtime_ns for p in work.rglob('*.log')}

    # killed during the last validation, while a line was written
    (cell / 'result.json').unlink()
    for path in cell.glob('*/vis_data/scalars.json'):
        kept = [line for line in path.read_text().splitlines(keepends=True)
                if not ('mIoU' in line and '"step": 4' in line)]
        path.write_text(''.join(kept) + '{"mIo')
    log, _ = start(command).communicate()
    again = json.loads((cell / 'result.json').read_text())
    assert (again['miou'], again['loss']) == (result['miou'], result['loss']), log[-4000:]


def test_progress_within_a_cell(cells, tmp_path):
    assert cells.progress(tmp_path, 400) == 'iteration 0 of 400'
    log = tmp_path / '1/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    entries = [dict(loss=2., time=.5, step=20), dict(loss=1.25, time=.5, step=40)]
    log.write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    text = 'iteration 40 of 400, loss 1.25, 0:03:00 of training left'
    assert cells.progress(tmp_path, 400) == text
    log.write_text(log.read_text() + json.dumps(dict(mIoU=12.5, step=40)))
    assert cells.progress(tmp_path, 400) == text + ', mIoU 12.50 at 40'


def test_a_running_cell_tells_how_far_it_is(cells, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cells, 'TELL_SECONDS', .3)
    script = tmp_path / 'train.py'
    script.write_text('import time; time.sleep(1); raise SystemExit("no data")')
    monkeypatch.setattr(cells, 'TRAIN', script)
    cfg = Config(dict(train_cfg=dict(max_iters=7)))
    assert cells.run(tmp_path / 'cell', cfg, '[1/1] a')['error'] == 'no data'
    assert '    [1/1] a: iteration 0 of 7' in capsys.readouterr().out


def test_an_interrupt_leaves_no_training_behind(cells, tmp_path, monkeypatch):
    script = tmp_path / 'train.py'
    script.write_text('import time; time.sleep(600)')
    monkeypatch.setattr(cells, 'TRAIN', script)
    cfg = Config(dict(train_cfg=dict(max_iters=7)))
    grid = [cells.Cell('a', 1, .1, seed, tmp_path / str(seed), cfg) for seed in range(3)]
    started = set()

    def interrupt():
        while len(started) < 2:
            started.update(cells._running)
            time.sleep(.05)
        os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        list(cells.run_all(grid, 2, False))
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not cells._running and not (tmp_path / '2').exists()


def test_other_settings_are_another_cell(cells):
    cfg = Config.fromfile(ROOT / f'configs/deeplabv3/{KN}.py')
    cfg.randomness = dict(seed=0)
    folder = cells.folder_of(cfg)
    assert folder.startswith('b2_s0-') and folder == cells.folder_of(cfg.copy())
    cfg.optim_wrapper.optimizer.lr = 7
    assert cells.folder_of(cfg) != folder


def test_rescaling_follows_the_shipped_schedules(cells):
    folder = ROOT / 'configs/deeplabv3'
    for batch, length in ((1, '320k'), (2, '160k')):
        cfg = Config.fromfile(folder / 'deeplabv3_knr18-d8_4xb2-80k_cityscapes-512x1024.py')
        cfg.train_dataloader.batch_size = 8
        # The schedules of one GPU see half as many images.
        cfg.merge_from_dict({
            'train_cfg.max_iters': 40000, 'train_cfg.val_interval': 4000,
            'param_scheduler.0.end': 40000, 'default_hooks.checkpoint.interval': 4000})
        cells.rescale(cfg, batch)
        shipped = Config.fromfile(
            folder / f'deeplabv3_knr18-d8_1xb{batch}-{length}_cityscapes-512x1024.py')
        assert cfg.optim_wrapper == shipped.optim_wrapper
        assert cfg.param_scheduler == shipped.param_scheduler
        assert cfg.train_cfg == shipped.train_cfg
        assert cfg.default_hooks.checkpoint == shipped.default_hooks.checkpoint


def test_each_cell_has_settings_of_its_own(cells):
    configs = {KN: Config.fromfile(ROOT / f'configs/deeplabv3/{KN}.py')}
    got = cells.grid(configs, [1, 2, 8], [0, 1], Path('work'))
    assert [(cell.batch, cell.seed) for cell in got] == [
        (1, 0), (2, 0), (8, 0), (1, 1), (2, 1), (8, 1)]
    for cell in got:
        cfg, batch = cell.cfg, cell.batch
        assert cfg.train_dataloader.batch_size == batch
        assert cfg.randomness == dict(seed=cell.seed)
        assert cell.lr == cfg.optim_wrapper.optimizer.lr == pytest.approx(.03 * batch / 2)
        assert cfg.train_cfg.max_iters == cfg.param_scheduler[0].end == 800 // batch
        assert cell.folder.name.startswith(f'b{batch}_s{cell.seed}-')
    assert len({cell.folder for cell in got}) == 6


def test_the_best_rate_of_a_scan_goes_into_the_table(tool, cells, monkeypatch, capsys, tmp_path):
    """One for each config and batch size, found on a seed that the table does not show."""
    miou = {(KN, 1, .015): 30, (KN, 1, .05): 20, (KN, 4, .06): 28, (KN, 4, .2): None,
            (BN, 1, .015): None, (BN, 1, .05): None, (BN, 4, .06): 10, (BN, 4, .2): 12}
    trained = []

    def run_all(given, jobs, retry_failed):
        for cell in given:
            trained.append((cell.name, cell.batch, cell.lr, cell.seed))
            value = miou[cell.name, cell.batch, round(cell.lr, 9)]
            fate = dict(error='lost') if value is None else dict(
                miou=[(1, value + cell.seed)], loss=[(1, 1.)], iteration_seconds=1., gpu_mib=0)
            yield cell, dict(fate, seconds=1, resident_mib=7)

    monkeypatch.setattr(tool, 'run_all', run_all)
    monkeypatch.setattr(tool, 'complexity', lambda cfg: (1., 2.))
    monkeypatch.setattr(sys, 'argv', list(map(str, [
        'compare_norms.py', *(ROOT / f'configs/deeplabv3/{name}.py' for name in (KN, BN)),
        '--batch-sizes', 1, 4, '--scan-lrs', .03, .1, '--scan-seed', 9, '--seeds', 0, 1,
        '--work-dir', tmp_path])))
    tool.main()
    assert len(trained) == 8 + 6 and {cell[3] for cell in trained[:8]} == {9}
    best = {(KN, 1): .015, (KN, 4): .06, (BN, 4): .2}
    assert {cell[:2]: pytest.approx(cell[2]) for cell in trained[8:]} == best
    out = capsys.readouterr().out
    assert f'best of --scan-lrs: {KN}, batch 1: lr 0.015' in out and '3 of 14 cells failed' in out
    with open(tmp_path / 'results.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['part'] for row in rows] == ['scan'] * 8 + ['table'] * 6
    assert rows[8]['validations'] == '1:30.00' and rows[8]['mIoU'] == '30'


@pytest.mark.parametrize('options, message', [
    (['--scan-lrs', '.1'], 'needs a --scan-seed'),
    (['--scan-lrs', '.1', '--scan-seed', '0'], 'which is none of the --seeds'),
    (['--scan-seed', '5'], 'needs a --scan-seed'),
    (['--scan-lrs', '.1', '--scan-seed', '5', '--lrs', '.1'], 'give one'),
    (['--jobs', '0'], 'at least 1')])
def test_a_scan_that_would_choose_on_the_table_is_refused(tool, monkeypatch, capsys, options,
                                                         message):
    config = str(ROOT / f'configs/deeplabv3/{KN}.py')
    monkeypatch.setattr(sys, 'argv', ['compare_norms.py', config, *options])
    with pytest.raises(SystemExit):
        tool.parse_args()
    assert message in capsys.readouterr().err


def test_the_table_pairs_seeds(tool, report):
    def cell(miou):
        return dict(miou=[(1, miou)], loss=[(1, 1.)], iteration_seconds=.5, gpu_mib=0,
                    resident_mib=7)

    groups = {('a', 2): {0: cell(30.), 1: cell(31.), 2: cell(33.)},
              ('b', 2): {0: cell(20.), 1: cell(22.), 2: cell(26.)},
              ('c', 2): {0: dict(error='no | room'), 1: cell(29.)}}
    rows = report.summary(groups, dict.fromkeys(groups, .01), dict.fromkeys('abc', (12., 3.)), 'a')
    assert [(r['mIoU'], r['std'], r['of each seed']) for r in rows] == [
        ('31.3', '1.5', '30.0, 31.0, 33.0'), ('22.7', '3.1', '20.0, 22.0, 26.0'),
        ('29.0', '', '29.0')]
    # differences -10, -9, -7: t = -9.83 with two degrees of freedom
    assert [(r['to the first, paired'], r['p']) for r in rows] == [
        ('', ''), ('-8.7', '0.01'), ('-2.0', '')]
    assert rows[2]['failed'] == 'no | room'
    lines = tool.markdown(rows).splitlines()
    assert lines[2] == (
        '| a | 2 | 0.01 | 31.3 | 1.5 | 30.0, 31.0, 33.0 |  |  | 4.00 | 7 | 12.0 | 3.0 |  |')
    assert lines[4].endswith(' | no / room |') and 'failed' not in tool.markdown(rows[:2])


def test_curves_that_lack_a_validation_are_drawn(report):
    import matplotlib.pyplot as plt
    _, ax = plt.subplots()
    report.draw_curves(ax, [[(1, 5.), (2, 6.), (3, 7.)], [(1, 7.), (3, 9.)]], 1, color='C0')
    assert ax.lines[0].get_xydata().tolist() == [[1, 6], [3, 8]]


def test_other_schedules_and_datasets(tool, cells, tmp_path):
    """What mmseg's configs may have and ours do not."""
    cfg = Config(dict(
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=80, val_interval=40),
        optim_wrapper=dict(optimizer=dict(lr=.4)),
        param_scheduler=dict(type='MultiStepLR', milestones=[40, 60], end=80, eta_min=.1),
        train_dataloader=dict(batch_size=4, dataset=dict(type='RepeatDataset', dataset=dict(
            type='ConcatDataset', datasets=[dict(data_root='a'), dict(data_root='b')]))),
        val_dataloader=dict(dataset=dict(data_root='a')),
        test_dataloader=dict(dataset=dict(data_root='a'))))
    cfg.dump(tmp_path / 'config.py')
    args = SimpleNamespace(data_root='c', cfg_options=None)
    cfg = tool.load(str(tmp_path / 'config.py'), args)
    assert [d.data_root for d in cfg.train_dataloader.dataset.dataset.datasets] == ['c', 'c']
    cell, = (c.cfg for c in cells.grid(dict(x=cfg), [2], [0], tmp_path))
    assert cell.param_scheduler == dict(
        type='MultiStepLR', milestones=[80, 120], end=160, eta_min=.05)
    assert cell.default_hooks.checkpoint == dict(
        type='SafeCheckpointHook', by_epoch=False, interval=160)


def test_a_config_and_its_kernel_normalized_twin(tool, cells, tmp_path):
    path = ROOT / f'configs/deeplabv3/{BN}.py'
    cfg = tool.load(str(path), SimpleNamespace(data_root=None, cfg_options=None))
    twin = tool.kernelized(cfg)
    assert cfg.model.type == 'EncoderDecoder' and cfg.model.data_preprocessor.mean[0] > 100
    assert twin.model.model.data_preprocessor.mean == [0, 0, 0]
    assert twin.model.model.data_preprocessor.std == [255, 255, 255]
    assert twin.optim_wrapper.clip_grad == dict(max_norm=1)
    assert 'mmseg_kn' in twin.custom_imports.imports
    cell, = cells.grid({f'{BN}-kn': twin}, [1], [0], tmp_path)
    cell.cfg.dump(tmp_path / 'config.py')  # as it is trained from
    init_default_scope('mmseg')
    layers = list(MODELS.build(Config.fromfile(tmp_path / 'config.py').model).modules())
    assert any(isinstance(layer, KNConv2d) for layer in layers)
    assert not any(isinstance(layer, _BatchNorm) for layer in layers)

    for key in ('model.backbone.init_cfg', 'load_from'):  # weights, which know their input
        cfg = tool.load(str(path), SimpleNamespace(data_root=None, cfg_options={
            key: 'w.pth' if key == 'load_from' else dict(type='Pretrained', checkpoint='w.pth')}))
        assert tool.kernelized(cfg).model.model.data_preprocessor.mean[0] > 100
    with pytest.raises(SystemExit, match='has KernelNormalized already'):
        tool.kernelized(twin)


def test_rates_of_configs_and_twins(tool, monkeypatch, capsys):
    config = str(ROOT / f'configs/deeplabv3/{BN}.py')
    monkeypatch.setattr(sys, 'argv', ['compare_norms.py', config, '--kernelize', '--lrs', '.1'])
    with pytest.raises(SystemExit):
        tool.parse_args()
    assert 'each of the 2 configs, twins included, got 1' in capsys.readouterr().err


def test_table_and_curves_of_rows_that_have_run(tmp_path):
    rows = ['config,batch_size,lr,seed,iterations,mIoU,validations']
    for name, batch, seed, length, first, last in (
            ('a', 2, 1, 8, 10, 31), ('a', 2, 0, 8, 12, 30), ('a', 2, 7, 8, 9, 99),
            ('b', 2, 0, 8, 5, 34), ('b', 2, 1, 8, 6, 33), ('a', 2, 0, 4, 7, 20),
            ('b', 1, 0, 8, 5, 40)):
        rows.append(f'deeplab_{name},{batch},0.1,{seed},{length},{last},4:{first} 8:{last}')
    (tmp_path / 'rows.csv').write_text('\n'.join([*rows, 'deeplab_c,2,0.1,0,,,']))
    log = execute(FOLDER / 'norm_curves.py', 'rows.csv', '--seeds', '0', '1', '--out', 'c.png',
                  cwd=tmp_path)
    assert [line.split(' | ')[1:] for line in log.splitlines()[2:] if line] == [
        ['2', '0.1', '30.5', '0.7', '30.0, 31.0', '', ' |'],
        ['2', '0.1', '33.5', '0.7', '34.0, 33.0', '+3.0', '0.2 |'],
        ['1', '0.1', '40.0', '', '40.0', '', ' |']]
    assert cv2.imread(str(tmp_path / 'c.png')).shape[1] > 600
    log = execute(FOLDER / 'norm_curves.py', 'rows.csv', '--first', '_b', cwd=tmp_path)
    assert [line.split(' | ')[0] for line in log.splitlines()[2:] if line] == [
        '| deeplab_b', '| deeplab_b', '| deeplab_a']
    log = execute(FOLDER / 'norm_curves.py', 'rows.csv', '--iterations', '9', cwd=tmp_path,
                  check=False)
    assert log == 'no row of rows.csv has these iterations, seeds and batch sizes\n'


def test_complexity_of_a_plain_config(report):
    """Neither custom_imports nor a crop size in the data preprocessor."""
    cfg = Config.fromfile(ROOT / f'configs/deeplabv3/{BN}.py')
    expected = report.complexity(cfg)
    cfg.crop_size = cfg.model.data_preprocessor.pop('size')
    cfg.pop('custom_imports')
    assert report.complexity(cfg) == expected


def test_labels_are_what_names_do_not_share(report):
    assert report.short(['fcn_r18-d8_camvid', 'fcn_r18-gn-d8_camvid']) == {
        'fcn_r18-d8_camvid': 'r18-d8', 'fcn_r18-gn-d8_camvid': 'r18-gn-d8'}
    assert report.short(['fcn_r18']) == {'fcn_r18': 'fcn_r18'}


def test_an_epoch_schedule_is_refused(tool, tmp_path):
    path = tmp_path / 'epochs.py'
    path.write_text("train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)")
    with pytest.raises(SystemExit, match='must train by iterations'):
        tool.load(str(path), None)


def test_no_norm_scales_and_shifts_alone():
    layer = NoNorm(3, eps=1e-5)
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(layer(x), x)
    torch.nn.init.constant_(layer.weight, 2)
    torch.nn.init.constant_(layer.bias, 1)
    assert torch.equal(layer(x), 2 * x + 1)


def test_the_plain_pool_head_trains_batch_norm_with_one_image():
    head = PlainPoolASPPHead(in_channels=4, channels=8, dilations=(1, 2), num_classes=3,
                             norm_cfg=dict(type='BN'))
    assert head([torch.randn(1, 4, 5, 6)]).shape == (1, 3, 5, 6)
    norms = [m for m in head.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 3 and not any(
        isinstance(m, torch.nn.BatchNorm2d) for m in head.image_pool.modules())


def test_batch_norm_with_one_image_by_options():
    """As docs/choosing_a_normalization.md has them, on a config that does not import the head."""
    cfg = Config.fromfile(
        ROOT / 'configs/deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py')
    cfg.merge_from_dict({'model.decode_head.type': 'mmseg_kn.baselines.PlainPoolASPPHead',
                         'model.backbone.norm_eval': True})
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    model(torch.rand(1, 3, 64, 64), mode='tensor')
    frozen, moving = ({m.training for m in part.modules() if isinstance(m, _BatchNorm)}
                      for part in (model.backbone, model.decode_head))
    assert (frozen, moving) == ({False}, {True})


@pytest.mark.parametrize('depth', [18, 50])
def test_the_architecture_with_another_normalization(depth):
    """Of no normalization at all it is a KNResNet whose windows are left as they are."""
    kwargs = dict(depth=depth, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4),
                  zero_init_residual=False)
    net = NormKNResNet(dict(type='BN'), **kwargs)
    kn = KNResNet(**kwargs)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    assert {name: p.shape for name, p in kn.named_parameters()}.items() <= shapes.items()
    assert not any(isinstance(m, KNConv2d) for m in net.modules())
    convs = [m for m in kn.modules() if isinstance(m, KNConv2d)]
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [n.num_features for n in norms[:len(convs)]] == [c.in_channels for c in convs]
    assert len(norms) == len(convs) + 4  # and one for each output

    net = NormKNResNet(dict(type='BN'), frozen_stages=1, **kwargs)
    assert not any(p.requires_grad for part in (net.stem, net.layer1) for p in part.parameters())
    assert all(p.requires_grad for p in net.layer2.parameters())

    net = NormKNResNet(dict(type='NoNorm'), **kwargs).double()
    net.load_state_dict({**net.state_dict(), **kn.state_dict()})
    kn.double()
    for conv in convs:
        conv.forward = types.MethodType(plain, conv)
    for i in range(4):
        setattr(kn, f'norm{i + 1}', torch.nn.ReLU())
    x = torch.rand(1, 3, 33, 46, dtype=torch.float64)
    for got, expected in zip(net(x), kn(x), strict=True):
        torch.testing.assert_close(got, expected)


def plain(self, input, residual=0):
    """A KNConv2d without its normalization."""
    left, right, top, bottom = (self.padding if len(self.padding) == 4 else
                                [p for p in self.padding[::-1] for _ in range(2)])
    input = input.relu() if self.input_activation else input
    output = torch.nn.functional.conv2d(
        torch.nn.functional.pad(input, (left, right, top, bottom)), self.weight, self.bias,
        self.stride, dilation=self.dilation) + residual
    return output.relu() if self.activation else output
