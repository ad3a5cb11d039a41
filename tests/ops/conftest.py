import pytest
from op_cases import ALL

from mmseg_kn.ops import cpu_chunks, fused, unfolded


@pytest.fixture
def largest_tiny(request, monkeypatch):
    """Elements of the largest input of which 'fused' builds the units.

    None by default: inputs are tiny in tests, and the closed form is what most are about.
    """
    monkeypatch.setattr(unfolded, 'LARGEST', getattr(request, 'param', 0))


@pytest.fixture(params=[2**20, 50, 'units'], ids=['whole', 'chunks', 'units'])
def chunk(request, monkeypatch, largest_tiny):
    """The CPU's passes over the whole tensor, and in chunks; or no passes, but units."""
    if request.param == 'units':
        monkeypatch.setattr(unfolded, 'LARGEST', ALL)
        return
    monkeypatch.setattr(cpu_chunks, 'CHUNK', request.param)
    monkeypatch.setattr(fused, '_WIDE', request.param)
