"""The random numbers of dropout in the kernels: Philox4x32 of seven rounds."""
import pytest
import torch

triton = pytest.importorskip('triton')
triton_passes = pytest.importorskip('mmseg_kn.ops.triton_passes')
tl = pytest.importorskip('triton.language')

from mmseg_kn.ops.triton_blocks import random4, stays  # noqa: E402

DEVICE = 'cpu' if triton_passes.INTERPRETED else 'cuda'
PIXELS, QUARTER = 1024, 32


@triton.jit
def draw(out_ptr, kept_ptr, seed_ptr, threshold, P: tl.constexpr, C4: tl.constexpr):
    pixel = tl.program_id(0) * P + tl.arange(0, P)
    lane = tl.arange(0, C4)
    bits = random4(tl.load(seed_ptr), pixel, 0, 4 * C4, tl.zeros([P, C4], tl.float32), C4)
    for j in tl.static_range(4):
        at = pixel[:, None] * (4 * C4) + (j * C4 + lane)[None, :]
        tl.store(out_ptr + at, bits[j].to(tl.int64), None)
        tl.store(kept_ptr + at, stays(bits[j], threshold).to(tl.int8), None)


def numbers(seed, threshold=0):
    """(pixels, channels) of uniform integers below 2 ** 32, and which of them stay."""
    out = torch.empty(PIXELS, 4 * QUARTER, dtype=torch.int64, device=DEVICE)
    kept = torch.empty_like(out, dtype=torch.int8)
    draw[(1, )](out, kept, torch.tensor([seed], device=DEVICE), threshold, P=PIXELS, C4=QUARTER)
    return out.cpu(), kept.cpu().bool()


def test_it_is_philox():
    """Known answers for counter and key 0, of Random123, Salmon et al., SC 2011 (kat_vectors)."""
    first = numbers(0)[0][0]
    assert [hex(first[j * QUARTER]) for j in range(4)] == [
        '0x5f6fb709', '0xd893f64', '0x4f121f81', '0x4f730a48']


def correlation(a, b):
    return (a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()


def test_seven_rounds_are_enough():
    """Rate, and independence of neighbours, of layers and of steps, which differ in the seed."""
    # seeds as one generator draws them, and the nearest that there are
    seeds = (0, 1, 2, 2**32, 2**62 + 1, 7205759403792793)
    draws = [numbers(seed)[0].double() / 2**32 - 0.5 for seed in seeds]
    few = 4.5 / draws[0].numel()**0.5  # standard deviations of a correlation
    for a in draws:
        assert abs(a.mean()) < few * 12**-0.5 and abs(a.square().mean() * 12 - 1) < 2 * few
        for dim in (0, 1):
            for lag in (1, 2, 3, 4, 8, 16, 32, 64):
                size = a.size(dim) - lag
                low, high = a.narrow(dim, 0, size), a.narrow(dim, lag, size)
                assert abs(correlation(low, high)) < few * (a.size(dim) / size)**0.5
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(correlation(a, b)) < few
            for p in (0.05, 0.001):  # what is dropped in both
                both = ((a < p - 0.5) & (b < p - 0.5)).sum()
                assert abs(both - a.numel() * p * p) < 4.5 * (a.numel() * p * p)**0.5 + 3


@pytest.mark.parametrize('p', [0.0, 1e-4, 0.05, 0.5, 0.95])
def test_rate(p):
    bits, kept = numbers(3, triton_passes._threshold(p))
    assert torch.equal(kept, bits >= triton_passes._threshold(p))
    lost = (~kept).sum().item()
    assert abs(lost - kept.numel() * p) <= 4.5 * (kept.numel() * p * (1 - p))**0.5
