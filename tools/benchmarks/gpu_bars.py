"""What a GPU must reach, what check_gpu.py has measured of it, and the page that says so."""
import csv
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from shared import markdown


def _rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def _layers(over: str, under: str, mode: str) -> Callable[[Path], float | None]:
    """Geometric mean of two rows of layers.csv over its shapes."""
    def value(out):
        times = {(r['shape'], r['batch'], r['row']): float(r['median_ms'])
                 for r in _rows(out / 'layers.csv') if r['mode'] == mode}
        ratios = [ms / times[shape, batch, under] for (shape, batch, row), ms in times.items()
                  if row == over]
        return statistics.geometric_mean(ratios) if ratios else None
    return value


def _step(name: str, column: str) -> Callable[[Path], float | None]:
    """KernelNorm's training step over BatchNorm's, by a column of a table of steps."""
    def value(out):
        rows = [float(r[column]) for r in _rows(out / f'{name}.csv') if r['step'] == 'train']
        return rows[0] / rows[1] if len(rows) == 2 else None
    return value


CHECKS = ('networks', 'kernels', 'sanitizer')
# what, where it comes from, and the highest value that passes
BARS = (
    ('layer, KNConv + ReLU / conv + BatchNorm + ReLU, training',
     _layers('knconv+relu', 'conv+bn+relu', 'train'), 1.0),
    ('layer, KNConv / conv + BatchNorm, training', _layers('knconv', 'conv+bn', 'train'), 1.1),
    ('layer, KNConv / conv, evaluation', _layers('knconv', 'conv', 'eval'), 1.1),
    ('training step, KNResNet-18 / ResNet-18, graphs', _step('step18-graphs', 'median_ms'), 1.05),
    ('training step, KNResNet-50 / ResNet-50, graphs', _step('step50-graphs', 'median_ms'), 1.05),
    ('peak of a step, KNResNet-18 / ResNet-18', _step('step18', 'peak_mib'), 0.9),
    ('peak of a step, KNResNet-50 / ResNet-50', _step('step50', 'peak_mib'), 0.9),
)


def judge(out: Path, states: dict[str, dict]) -> list[dict]:
    """A row for each bar, and one for each command that checks rather than measures."""
    verdicts = []
    for name in CHECKS:
        state = states.get(name)
        log = out / f'{name}.log'
        told = re.findall(r'\d+ (?:passed|failed|error)[^\n]*', log.read_text()) if state else []
        verdicts.append({
            'what': f'tests: {name}', 'bar': '', 'measured': told[-1] if told else '',
            'verdict': ('not run' if state is None else
                        'passed' if state['returncode'] == 0 else 'missed')})
    for what, measure, bar in BARS:
        value = measure(out)
        verdicts.append({
            'what': what, 'bar': f'{bar:.2f}', 'measured': '' if value is None else f'{value:.3f}',
            'verdict': ('not measured' if value is None else
                        'passed' if value <= bar else 'missed')})
    for name, state in states.items():
        if state['returncode'] and name not in CHECKS:
            verdicts.append({'what': f'the command {name}', 'bar': '', 'measured': 'failed',
                             'verdict': 'missed'})
    return verdicts


def _layer_table(out: Path) -> list[dict]:
    """Training steps of each layer: the GPU's time, and the host's."""
    times = {(r['shape'], r['batch'], r['row']): r for r in _rows(out / 'layers.csv')
             if r['mode'] == 'train'}
    return [{'layer': shape, 'batch': batch,
             **{f'{row}, {clock}': times[shape, batch, row][column]
                for row in ('conv+bn+relu', 'knconv+relu')
                for clock, column in (('ms', 'median_ms'), ('host ms', 'host_ms'))}}
            for shape, batch, row in times if row == 'knconv+relu']


def page(setting: dict[str, str], verdicts: list[dict], states: dict[str, dict],
         trainings: list[dict], rehearsal: bool, out: Path) -> str:
    """Markdown."""
    lines = ['# KernelNorm on this GPU\n',
             ', '.join(f'{name} {value}' for name, value in setting.items()) + '\n']
    if rehearsal:
        lines.append('**A rehearsal on a CPU: the figures mean nothing.**\n')
    lines.append(markdown(verdicts))
    if trainings:
        lines.append('Short trainings, validation mIoU:\n\n' + markdown(trainings))
    for title, rows in (('Layers, training steps:', _layer_table(out)),
                        ('Passes of a layer:', _rows(out / 'passes.csv'))):
        if rows:
            lines.append(f'{title}\n\n{markdown(rows)}')
    lines.append('Seconds each command took: ' + ', '.join(
        f'{name} {state["seconds"]}' for name, state in states.items()) + '\n')
    return '\n'.join(lines)
