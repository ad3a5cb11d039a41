"""Dropout of the statistics: its masks, their use, and its expectation in evaluation."""
import golden
import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    ALL_FORMS,
    DEVICE,
    EPILOGUES,
    IMPLS,
    OPTIONS,
    PASSES,
    TOLERANCE,
    kept_elements,
    make_case,
    relative_error,
    run,
)
from torch.utils.checkpoint import checkpoint

from mmseg_kn.ops import fused, kernel_norm2d, kn_conv2d
from mmseg_kn.ops.geometry import make_geometry

triton_passes = pytest.importorskip('mmseg_kn.ops.triton_passes')
pytestmark = pytest.mark.usefixtures('full_float32', 'largest_tiny')


@pytest.mark.parametrize('impl', IMPLS)
def test_evaluation_is_the_mean_of_training_passes(impl):
    weight = golden.parameter('expect.weight', (8, 16, 3, 3)).float()
    bias = golden.parameter('expect.bias', (8, )).float()
    x = golden.signal((1, 16, 12, 12), seed=3).float().relu()
    y = kn_conv2d(x, weight, bias, padding=1, dropout_p=0.25, impl=impl)
    plain = kn_conv2d(x, weight, bias, padding=1, impl=impl)
    centre = torch.tensor(golden.EXPECT_CENTRE)
    corner = torch.tensor(golden.EXPECT_CORNER)

    def error(y):
        return torch.cat([y[0, :, 5, 5] - centre, y[0, 0, 0, :4] - corner]).abs().mean()

    assert error(y) < 0.02
    assert error(plain) > 10 * error(y)
    assert torch.equal(y, kn_conv2d(x, weight, bias, padding=1, dropout_p=0.25, impl=impl))


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('chunk, impl, dtype, p, options', [
    *((2**20, 'fused', torch.float64, 0.3, options) for options in OPTIONS),
    *((50, 'fused', torch.float64, 0.3, options) for options in OPTIONS),
    *(('units', 'fused', torch.float64, 0.3, options) for options in OPTIONS),
    *((2**20, 'triton', torch.float32, 0.3, options) for options in OPTIONS),
    # below 0.01 other random numbers (fused), and in float32 a centred kernel
    *((chunk, impl, dtype, p, options)
      for chunk, impl in ((50, 'fused'), ('units', 'fused'), (2**20, 'triton'))
      for dtype, p in ((torch.float32, 0.005), (torch.float16, 0.3), (torch.bfloat16, 0.3))
      for options in OPTIONS[2:7:2]),  # relu, with a rectified input, residual
], indirect=['chunk'])
def test_dropout_of_the_statistics_by_definition(options, impl, dtype, p, channels_last, chunk,
                                                 monkeypatch):
    """With an implementation's own mask, as its backward sees it, the definition agrees."""
    epilogue = EPILOGUES[OPTIONS.index(options) % len(EPILOGUES)]
    inputs, options = make_case(**options, **epilogue,
                                device=DEVICE if impl == 'triton' else 'cpu')
    inputs = [t.detach().to(dtype) for t in inputs]
    if channels_last:
        inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    drawn, passes = [], PASSES[impl]
    draw = passes.draw_mask
    monkeypatch.setattr(passes, 'draw_mask',
                        lambda x, p: drawn.append((x, draw(x, p))) or drawn[-1][1])
    actual = run(inputs, impl, dropout_p=p, training=True, **options)
    (x, dropped), = drawn
    padding = make_geometry(inputs[1].shape[2:], options.get('stride', 1),
                            options.get('padding', 0), options.get('dilation', 1)).padding
    if x.shape == inputs[0].shape:
        scale = F.pad(kept_elements(passes, inputs[0], dropped, p), padding)
    else:  # elements of the padding are counted where the sides differ
        scale = kept_elements(passes, F.pad(inputs[0], padding), dropped, p)
    scale = scale.double() / (1 - p)
    monkeypatch.setattr(F, 'dropout', lambda input, p: input * scale)
    expected = run([t.double() for t in inputs], 'reference', dropout_p=p, training=True,
                   **options)
    for a, e in zip(actual, expected, strict=True):
        # in half, rounding moves an output or two to the other side of the relu
        flips = dtype.itemsize == 2 and 'activation' in epilogue
        assert relative_error(a, e) < (0.1 if flips else TOLERANCE[dtype])


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('impl', PASSES)
def test_dropout_rate_and_independence(impl, channels_last, chunk):
    passes = PASSES[impl]
    device = DEVICE if impl == 'triton' else 'cpu'
    x = torch.ones(2, 70, 12, 11, device=device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for p in (1e-3, 0.05, 0.5):
        masks = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            masks.append(kept_elements(passes, x, passes.draw_mask(x, p), p))
        again = kept_elements(passes, x, passes.draw_mask(x, p), p)
        assert set(masks[0].unique().tolist()) == {0.0, 1.0}
        assert torch.equal(masks[0], masks[1])
        for mask in (masks[0], masks[2], again):  # seeds, then draws from one seed
            lost = 1 - mask.double()
            assert abs(lost.sum() - x.numel() * p) < 4 * (x.numel() * p * (1 - p))**0.5
            # neighbours of each kind drop together at rate p * p
            for dim in (0, 1, 2, 3):
                size = x.size(dim) - 1
                pairs = (lost.narrow(dim, 0, size) * lost.narrow(dim, 1, size)).sum()
                expected = x.numel() / (size + 1) * size * p * p
                assert abs(pairs - expected) < 4 * expected**0.5 + 4
        for a, b in ((masks[0], masks[2]), (masks[2], again)):
            both = ((1 - a) * (1 - b)).sum()
            assert abs(both - x.numel() * p * p) < 4 * (x.numel() * p * p)**0.5 + 4


@pytest.mark.parametrize('p', [0.05, 1e-4, 1e-19])
def test_drawn_positions(p):
    torch.manual_seed(0)
    for shape in ((4, 64, 50, 50), (1, 4, 6, 6), (0, 4, 5, 5)):
        x = torch.empty(shape)
        positions = fused.draw_mask(x, p)
        inside = positions[positions < x.numel()]
        assert positions.dtype == torch.int32 and (inside.diff() > 0).all()
        assert (inside >= 0).all() and (positions <= x.numel()).all()
        assert abs(len(inside) - x.numel() * p) <= 4 * (x.numel() * p)**0.5
        # long enough that dropout reaches the end
        assert len(positions) > x.numel() * p + 8 * (x.numel() * p)**0.5


@pytest.mark.parametrize('channels_last', [False, True])
def test_dropped_and_kept_elements_count_as_scaled(channels_last):
    """Under p = 0.75 every kept element counts exactly four times."""
    for impl, passes in PASSES.items():
        x = torch.randint(-8, 8, (2, 70, 5, 3)).float()
        x = x.to(DEVICE if impl == 'triton' else 'cpu')
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        dropped = passes.draw_mask(x, 0.75)
        mask = kept_elements(passes, x, dropped, 0.75)
        moments = passes.unit_moments(x, make_geometry(1), dropped, 0.75, 1.0, 1e-5, True, True)
        torch.testing.assert_close(moments.mean.float(), (4 * mask * x).mean(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(moments.undropped_mean.float(), x.mean(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('activation', [None, 'relu'])
@pytest.mark.parametrize('impl', PASSES)
def test_kernel_norm2d_with_dropout_by_definition(impl, activation, channels_last, monkeypatch):
    passes, drawn = PASSES[impl], []
    draw = passes.draw_mask
    monkeypatch.setattr(passes, 'draw_mask',
                        lambda x, p: drawn.append(draw(x, p)) or drawn[-1])
    for channels in (3, 70):
        x = make_case(channels=channels, dtype=torch.float32, size=(5, 4),
                      device=DEVICE if impl == 'triton' else 'cpu')[0][0].detach() + 2
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)

        def run_norm(x, impl):
            x = x.detach().requires_grad_()
            y = kernel_norm2d(x, dropout_p=0.3, training=True, activation=activation, impl=impl)
            y.backward(golden.signal(y.shape, seed=1).to(y))
            return y.detach(), x.grad

        actual = run_norm(x, impl)
        scale = kept_elements(passes, x, drawn.pop(), 0.3).double() / 0.7
        monkeypatch.setattr(F, 'dropout', lambda input, p, scale=scale: input * scale)
        for a, e in zip(actual, run_norm(x.double(), 'reference'), strict=True):
            assert relative_error(a, e) < 2e-6
        with torch.no_grad():  # takes another way
            torch.manual_seed(0)
            y = kernel_norm2d(x, dropout_p=0.3, activation=activation, impl=impl)
        expected = kernel_norm2d(x.double(), dropout_p=0.3, activation=activation,
                                 impl='reference')
        assert relative_error(y, expected) < 2e-6


@pytest.mark.parametrize('p', [1e-6, 1e-7])
@ALL_FORMS
def test_expected_variance_of_a_constant_at_small_p(impl, p, monkeypatch):
    """float32, as which compiled kernels take numbers, knows 1 + p to 6e-8 only."""
    launch = triton_passes._launch
    monkeypatch.setattr(triton_passes, '_launch', lambda kernel, x, grid, *args, **constants: (
        launch(kernel, x, grid, *(torch.tensor(a, dtype=torch.float32).item()
                                  if isinstance(a, float) else a for a in args), **constants)))
    x = torch.full((1, 64, 2, 2), 100., device=DEVICE if impl == 'triton' else 'cpu')
    rstd = kn_conv2d(x, torch.ones(1, 64, 1, 1, device=x.device), dropout_p=p, impl=impl,
                     return_moments=True)[2].double()
    variance = rstd**-2 - 1e-5
    torch.testing.assert_close(variance, torch.full_like(variance, 1e4 * p / (1 - p) * 63 / 64),
                               rtol=1e-3, atol=0)


@ALL_FORMS
def test_gradient_checkpointing_draws_the_same_dropout(impl):
    inputs, options = make_case(padding=1, impl=impl, dtype=torch.float32,
                                device=DEVICE if impl == 'triton' else 'cpu')

    def gradients(call):
        torch.manual_seed(3)
        leaves = [t.detach().requires_grad_() for t in inputs]
        call(lambda *t: kn_conv2d(*t, dropout_p=0.3, training=True, **options), *leaves
             ).square().sum().backward()
        return [t.grad for t in leaves]

    plain = gradients(lambda f, *t: f(*t))
    recomputed = gradients(lambda f, *t: checkpoint(f, *t, use_reentrant=False))
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


def test_deterministic_algorithms_and_repeatability():
    inputs, options = make_case(padding=1, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        for impl in PASSES:
            leaves = [t.to(DEVICE if impl == 'triton' else 'cpu') for t in inputs]
            torch.manual_seed(2)
            first = run(leaves, impl, dropout_p=0.2, training=True, **options)
            torch.manual_seed(2)
            for a, b in zip(first, run(leaves, impl, dropout_p=0.2, training=True, **options),
                            strict=True):
                assert torch.equal(a, b)
    finally:
        torch.use_deterministic_algorithms(False)
