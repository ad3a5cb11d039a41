"""Results in documentation and metafiles: from which runs they come."""
import csv
import re
import statistics
import sys
from pathlib import Path

import mmengine
import pytest
from dev import config_tables
from misc import paper_configs
from mmengine.config.utils import _get_cfg_metainfo
from mmengine.hub import get_config
from mmengine.infer import BaseInferencer
from pages import PAGES
from program import ROOT, execute

TABLES = ROOT / 'tools/dev/config_tables.py'


@pytest.fixture(scope='module')
def measured():
    """'mean ± std, of each seed' of every group of runs in docs/benchmarks."""
    groups = {}
    for path in ROOT.glob('docs/benchmarks/*.csv'):
        with open(path, newline='') as file:
            for row in csv.DictReader(file):
                result = row.get('mIoU') or row.get('accuracy')
                if result and 'seed' in row:
                    settings = {key: value for key, value in row.items() if key in (
                        'config', 'options', 'batch_size', 'lr', 'iterations', 'data', 'norm',
                        'clip_grad', 'net', 'target_epsilon', 'noise_multiplier', 'part',
                        'epsilon', 'zero_init_residual', 'channels')}
                    groups.setdefault((path, *settings.values()), []).append(float(result))
    return {f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}, '
            + ', '.join(f'{value:.1f}' for value in values)
            for values in groups.values() if len(values) > 1}


def test_results_of_seeds_are_those_of_the_runs(measured):
    found = [f'{summary}, {values}' for page in PAGES for summary, values in re.findall(
        r'(\d+\.\d ± \d+\.\d)\**(?: \| | \()(\d+\.\d(?:, \d+\.\d)+)',
        ' '.join(page.read_text().split()))]
    assert len(found) > 30
    assert not [row for row in found if row not in measured]


@pytest.fixture(scope='module')
def models():
    return list(BaseInferencer._get_models_from_metafile(str(ROOT)))


def test_each_config_is_in_one_metafile(models):
    configs = [p.relative_to(ROOT).as_posix() for p in ROOT.glob('configs/[!_]*/*.py')]
    assert sorted(model['Config'] for model in models) == sorted(configs)
    assert all(Path(model['Config']).stem == model['Name'] for model in models)
    for imported in mmengine.load(ROOT / 'model-index.yml')['Import']:
        meta = mmengine.load(ROOT / imported)
        collection, = meta['Collections']
        assert (ROOT / collection['README']).is_file()
        for model in meta['Models']:
            assert model['In Collection'] == collection['Name']
            assert Path(model['Config']).parent == Path(imported).parent


def test_mmengine_reads_them(models, tmp_path, monkeypatch):
    (tmp_path / '.mim').symlink_to(ROOT)  # where a package keeps them
    for model in models:
        name = model['Config'].removeprefix('configs/')
        assert _get_cfg_metainfo(str(tmp_path), name) == model
    hub = sys.modules['mmengine.hub.hub']
    monkeypatch.setattr(hub, 'install_package', lambda name: None)
    monkeypatch.setattr(hub, 'get_installed_path', lambda name: str(tmp_path))
    cfg = get_config('mmseg::fcn/fcn_knr18-d8_4xb2-80k_cityscapes-512x1024.py')
    assert cfg.model.backbone.depth == 18


def test_figures_of_metafiles_are_measured(models):
    """By runs of docs/benchmarks, or by make demo as the README has it."""
    runs = {}
    with open(ROOT / 'docs/benchmarks/camvid_norms_cpu.csv', newline='') as file:
        for row in csv.DictReader(file):
            runs.setdefault(row['config'], []).append(float(row['mIoU'] or 'nan'))
    results = {m['Name']: m['Results']['Metrics']['mIoU'] for m in models if 'Results' in m}
    assert len(results) > 1
    for name, miou in results.items():
        if f'{name}, as shipped' in runs:
            assert miou == round(statistics.mean(runs[f'{name}, as shipped']), 1), name
        else:
            assert name in (ROOT / 'Makefile').read_text(), name
            assert f'{miou} mIoU' in (ROOT / 'README.md').read_text(), name


def test_figures_of_longer_trainings_are_measured():
    """Every run is on the page, with each of its validations if it is of full length."""
    text = (ROOT / 'docs/choosing_a_normalization.md').read_text()
    text = text.split('## Longer trainings')[1].split('\n## ')[0]
    with open(ROOT / 'docs/benchmarks/camvid_long_cpu.csv', newline='') as file:
        for row in csv.DictReader(file):
            figures = [row['mIoU']]
            if int(row['iterations']) == 6400:
                figures += [point.split(':')[1] for point in row['validations'].split()]
            for figure in figures:
                assert f'{float(figure):.1f}' in text, row['config']


def test_tables_are_those_of_the_metafiles():
    log = execute(TABLES, '--check', cwd=ROOT, check=False)
    assert not log, log


def test_a_stale_table_is_found(tmp_path):
    for name in ('README.md', 'metafile.yaml'):
        text = (ROOT / 'configs/fcn' / name).read_text()
        target = tmp_path / 'configs/fcn' / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace('| - |', '| 12.3 |', 1))
    readme = target.with_name('README.md')
    assert config_tables.stale(tmp_path) == {
        readme: (ROOT / 'configs/fcn/README.md').read_text()}


@pytest.mark.parametrize('folder', ['deeplabv3', 'fcn', 'kernelized', 'knconvnext'])
def test_each_config_is_in_one_table(models, folder):
    links = re.findall(r'\(([\w-]+)\.py\)', (ROOT / 'configs' / folder / 'README.md').read_text())
    assert sorted(links) == sorted(
        m['Name'] for m in models if m['Config'].startswith(f'configs/{folder}/'))


@pytest.mark.parametrize('change, message', [
    (lambda text, models: (text, [dict(models[0], Name='fcn_r18-xn-d8_1xb2-400_camvid-1x1')]),
     'a config must be named'),
    (lambda text, models: (text.replace('table of camvid', 'table of kitti'), models),
     'none for camvid'),
    (lambda text, models: (text, models[:1]), 'a table must have rows'),
])
def test_what_no_table_can_show_is_refused(change, message):
    meta = mmengine.load(ROOT / 'configs/fcn/metafile.yaml')
    text = (ROOT / 'configs/fcn/README.md').read_text()
    with pytest.raises(ValueError, match=message):
        config_tables.with_tables(*change(text, meta['Models']))


def test_every_cell_of_the_papers_tables_says_whether_it_was_run(tmp_path):
    text = (ROOT / 'docs/paper.md').read_text()
    tables = [[re.split(r' *\| *', line.strip('| ')) for line in block.splitlines()]
              for block in re.findall(r'(?:^\|.*\n)+', text, re.MULTILINE)]
    tables = [table for table in tables if table[0][0].startswith('network')]
    assert len(tables) == 5
    cells = [(head, cell) for heads, _, *rows in tables for row in rows
             for head, cell in zip(heads[1:], row[1:], strict=True)
             if head not in ('config', 'trained on')]
    assert len(cells) > 80
    assert not [cell for cell in cells if not re.fullmatch(
        r'theirs: [\d.]+|ours, below|([\d.]+, )?not run', cell[1])]
    # and no config is left out
    written = [path.stem for path in paper_configs.write(tmp_path, [1, 2])]
    networks = {name.split('_')[0] for name in written if name.endswith('_cifar100')}
    assert networks == {name for name in re.findall(r'`([\w-]+)` \|', text) if 'resnet' in name}
    configs = {path.relative_to(ROOT).as_posix() for pattern in (
        'fcn/*-d32_*', 'classification/*-dp-*', 'classification/*convnext*',
        'knconvnext/kn*') for path in ROOT.glob(f'configs/{pattern}.py')}
    assert configs == {cell for heads, _, *rows in tables if 'config' in heads
                       for row in rows for cell in re.findall(r'`(configs/.*)`', ' '.join(row))}
