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
        execute(ROOT / 'tools/benchmarks/gpu_dry_run.py', '--rounds', 0, '--depths', 50, '--out',
                'rows.csv', cwd=folder)
    with open(folder / 'rows.csv', newline='') as file:
        return {(row['metric'], row['case']): float(row['value']) for row in csv.DictReader(file)}


def values(rows, metric):
    found = [value for (name, _), value in rows.items() if name == metric]
    assert found, metric
    return found


def test_no_kernel_spills(rows):
    assert max(values(rows, 'spills')) == 0
    registers = [value for (name, _), value in rows.items() if name.startswith('registers_')]
    assert len(registers) >= 16 and max(registers) <= 255
    assert len(values(rows, 'registers_most')) == 5  # of other layers, which compile as well


def test_launches_of_a_layer(rows):
    """KNConv and its ReLU, forward and backward; convolution, BatchNorm and ReLU are eight."""
    assert max(values(rows, 'launches_layer_step')) <= 14
    assert rows['launches_layer_step', 'bfloat16'] <= 12
    assert rows['mib_layer_step', 'bfloat16'] <= rows['mib_layer_step', 'bfloat16, conv_bn']


def test_other_sizes_compile_nothing_new(rows):
    assert max(values(rows, 'variants_ten_sizes')) <= 30
    assert values(rows, 'variants_ten_sizes') == values(rows, 'variants_one_size')


def test_threads_load_several_elements_at_once(rows):
    for channels, bits in ((256, 64), (724, 64), (810, 32), (201, 16)):
        assert min(values(rows, f'min_load_bits_{channels}')) >= bits


def test_instructions_of_an_element(rows):
    """Of these, Philox's seven rounds take about seven.

    Where rows are of odd length every element has an address of its own.
    """
    assert max(values(rows, 'instructions_channel_sums')) <= 36
    assert max(values(rows, 'shuffles_channel_sums')) == 0
    for (name, case), value in rows.items():
        if name in ('instructions_scale_grad', 'instructions_add_moment_grads'):
            assert value <= (36 if case.startswith('201') else 30), case
