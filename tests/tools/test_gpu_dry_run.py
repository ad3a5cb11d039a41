"""The kernels as a GPU would run them: compiled, counted, not launched."""
import csv

import pytest
from program import ROOT, execute


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    """(metric, case) -> value, of a process of its own: this one interprets the kernels."""
    pytest.importorskip('triton')
    folder = tmp_path_factory.mktemp('dry_run')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TRITON_INTERPRET', '0')
        execute(ROOT / 'tools/benchmarks/gpu_dry_run.py', '--rounds', 0, '--out', 'rows.csv',
                cwd=folder)
    with open(folder / 'rows.csv', newline='') as file:
        return {(row['metric'], row['case']): float(row['value']) for row in csv.DictReader(file)}


def values(rows, metric):
    found = [value for (name, _), value in rows.items() if name == metric]
    assert found, metric
    return found


def test_no_kernel_spills(rows):
    assert max(values(rows, 'spills')) == 0
    registers = [value for (name, _), value in rows.items() if name.startswith('registers_')]
    assert len(registers) >= 20 and max(registers) <= 255
