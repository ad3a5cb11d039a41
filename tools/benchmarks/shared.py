"""What the benchmarks share: what a machine is called, what a step keeps and takes, tables."""
import csv
import hashlib
import platform
import statistics
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mmseg_kn


def device_name(device: torch.device | None = None) -> str:
    """The GPU, or the CPU and the threads in use; by default the GPU if there is one."""
    if device is None:
        device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in info.read_text().splitlines()
             if line.startswith('model name')] if info.exists() else []
    return f'{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads'


def versions() -> dict[str, str]:
    found = dict(torch=torch.__version__, mmseg_kn=mmseg_kn.__version__)
    if torch.cuda.is_available():
        found.update(cuda=torch.version.cuda, cudnn=str(torch.backends.cudnn.version()),
                     triton=metadata.version('triton') if find_spec('triton') else '')
    return found


def saved_bytes(module: nn.Module, x: Tensor, call=None) -> int:
    """Bytes that the backward pass of ``call(x)`` keeps: distinct storages, not the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = (call or module)(x)
        # the next layer's input, which a following convolution would save
        storages[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
    return sum(storages.values())


def giga_multiply_adds(call) -> float:
    """Of the convolutions and matrix products in ``call()``, in 10 ** 9."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2e9


def spread(milliseconds: list[float], digits: int) -> dict[str, str]:
    """The median and the 20 and 80 % quantiles, as columns of a table."""
    low, _, _, high = statistics.quantiles(milliseconds, n=5, method='inclusive')
    median = statistics.median(milliseconds)
    return {name: f'{value:.{digits}f}' for name, value in (
        ('median_ms', median), ('p20_ms', low), ('p80_ms', high))}


def short_hash(text: str) -> str:
    """Eight digits that tell settings or data apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write_csv(rows: list[dict], path: str | Path) -> None:
    """One line for each row, under the names of the first row's columns."""
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: list[dict]) -> str:
    """A table without the columns that are empty in every row."""
    heads = [head for head in rows[0] if any(row[head] != '' for row in rows)]
    lines = [heads, ['---'] * len(heads),
             *([str(row[head]).replace('|', '/') for head in heads] for row in rows)]
    return ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)
