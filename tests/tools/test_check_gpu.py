"""make gpu, as far as it can be seen without one: verdicts, resuming, refusals."""
import csv
import json
import sys
from types import SimpleNamespace

import pytest
from program import ROOT, load_tool

BENCHMARKS = ROOT / 'tools/benchmarks'


@pytest.fixture(scope='module')
def tool():
    return load_tool(BENCHMARKS / 'check_gpu.py')


@pytest.fixture(scope='module')
def bars():
    return load_tool(BENCHMARKS / 'gpu_bars.py')


def write(path, rows):
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_verdicts_follow_from_the_tables(bars, tmp_path):
    times = {'conv': (2, 1), 'conv+bn': (4, 1), 'conv+bn+relu': (5, 1), 'knconv': (5, 1.2),
             'knconv+relu': (4, 1)}
    write(tmp_path / 'layers.csv', [
        dict(shape=shape, batch=2, row=row, mode=mode, median_ms=scale * value, host_ms=0.5)
        for row, values in times.items() for mode, value in zip(('train', 'eval'), values,
                                                                strict=True)
        for shape, scale in (('a', 1), ('b', 7))])
    write(tmp_path / 'step18.csv', [
        dict(step=step, median_ms=ms, peak_mib=mib) for step, ms, mib in (
            ('train', 8, 70), ('infer', 1, 1), ('train', 10, 100), ('infer', 5, 5))])
    (tmp_path / 'networks.log').write_text('...\n9 passed, 8 warnings in 15s\n')
    states = dict(networks=dict(returncode=0), step18=dict(returncode=0),
                  passes=dict(returncode=1))
    rows = bars.judge(tmp_path, states)
    told = {row['what']: (row['measured'], row['verdict']) for row in rows}
    assert told['tests: networks'] == ('9 passed, 8 warnings in 15s', 'passed')
    assert told['tests: kernels'] == ('', 'not run')
    layers = [row for what, row in told.items() if what.startswith('layer')]
    assert layers == [('0.800', 'passed'), ('1.250', 'missed'), ('1.200', 'missed')]
    steps = [row for what, row in told.items() if 'ResNet-18' in what]
    assert steps == [('', 'not measured'), ('0.700', 'passed')]
    assert told['the command passes'] == ('failed', 'missed')
    text = bars.page(dict(device='none'), rows, {}, [], False, tmp_path)
    assert '| layer | batch | conv+bn+relu, ms | conv+bn+relu, host ms | knconv+relu, ms |' in text
    assert '| b | 2 | 35 | 0.5 | 28 | 0.5 |' in text and 'Passes' not in text


def call(tool, monkeypatch, out, *args):
    monkeypatch.setattr(sys, 'argv', ['check_gpu.py', '--rehearse', '--out', str(out), *args])
    tool.main()


def test_what_has_run_is_kept_and_what_ran_out_of_time_runs_again(tool, tmp_path, monkeypatch,
                                                                  capsys):
    started = []

    def commands(args):
        args.out = args.out.resolve()
        return [tool.Command('tests', 'networks', ['-c', 'print("3 passed")']),
                tool.Command('layers', 'layers', ['-c', 'raise SystemExit(2)']),
                tool.Command('steps', 'step18', ['-c', 'import time; time.sleep(60)'])]

    run = tool.run
    monkeypatch.setattr(tool, 'commands', commands)
    monkeypatch.setattr(tool, 'run', lambda command, out, seconds, rehearse: (
        started.append(command.name) or run(command, out, min(seconds, 2), rehearse)))
    call(tool, monkeypatch, tmp_path)
    out = capsys.readouterr().out
    assert 'FAILED, see' in out and 'not done after 8 minutes' in out
    assert 'not run yet: step18; the same command goes on' in out
    assert json.loads((tmp_path / 'layers.json').read_text())['returncode'] == 2
    assert '**A rehearsal on a CPU' in (tmp_path / 'gpu.md').read_text()
    call(tool, monkeypatch, tmp_path, 'steps')
    call(tool, monkeypatch, tmp_path, 'layers', '--again')
    assert started == ['networks', 'layers', 'step18', 'step18', 'layers']


@pytest.mark.parametrize('rehearse', [False, True])
def test_only_a_rehearsal_may_run_on_a_cpu(tool, tmp_path, monkeypatch, rehearse):
    for name in ('REHEARSE_GPU', 'TRITON_INTERPRET'):
        monkeypatch.setenv(name, '1')
    command = tool.Command('tests', 'env', [
        '-c', 'import os; raise SystemExit('
        'len({"REHEARSE_GPU", "TRITON_INTERPRET"} & os.environ.keys()))'])
    assert tool.run(command, tmp_path, 60, rehearse)['returncode'] == 2 * rehearse


def test_the_passes_of_a_layer_are_timed(tool, tmp_path):
    """As a rehearsal has them: kernels, in the interpreter."""
    pytest.importorskip('triton')
    args = SimpleNamespace(out=tmp_path, rehearse=True, data_root=tmp_path)
    command, = (c for c in tool.commands(args) if c.name == 'passes')
    state = tool.run(command, tmp_path, 300, True)
    assert state['returncode'] == 0, (tmp_path / 'passes.log').read_text()[-2000:]
    with open(tmp_path / 'passes.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert {'unit_moments', 'normalize', 'scale_grad', 'add_moment_grads', 'prepare_weight',
            'finish_weight_grad'} >= {row['pass'] for row in rows} >= {
                'unit_moments', 'normalize', 'scale_grad', 'add_moment_grads'}
    assert all(float(row['ms']) > 0 for row in rows)


def test_refusals(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool.torch.cuda, 'is_available', lambda: False)
    for argv, message in ((['layers'], 'torch sees no GPU here'),
                          (['--rehearse', 'kernels'],
                           'the parts are tests, layers, passes, steps, training, got kernels')):
        monkeypatch.setattr(sys, 'argv', ['check_gpu.py', *argv])
        monkeypatch.setattr(tool.shutil, 'which', lambda name: None)
        with pytest.raises(SystemExit):
            tool.parse_args()
        assert message in capsys.readouterr().err


def test_every_command_names_a_program_that_takes_its_options(tool, tmp_path, monkeypatch):
    """As far as argparse sees: each benchmark's parse_args accepts what a GPU would be given."""
    args = SimpleNamespace(out=tmp_path, rehearse=False, data_root='nowhere')
    seen = set()
    for command in tool.commands(args):
        program = next(map(str, command.argv))
        if 'benchmark_' in program:
            seen.add(command.name)
            monkeypatch.setattr(sys, 'argv', list(map(str, command.argv)))
            load_tool(BENCHMARKS / program.rsplit('/', 1)[1]).parse_args()
    assert seen == {'layers', 'layers-float32', 'passes', 'step18', 'step18-graphs', 'step50',
                    'step50-graphs'}
