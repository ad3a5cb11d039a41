"""Gradients, and what is kept for them."""
import golden
import pytest
import torch
from op_cases import ALL_FORMS, BOTH_FORMS, DEVICE, EPILOGUES, PASSES, make_case, run

from mmseg_kn.ops import kernel_norm2d, kn_conv2d

pytestmark = pytest.mark.usefixtures('full_float32', 'largest_tiny')
GRADCHECKS = [
    dict(padding=2, dilation=2, dropout_p=0.2, training=True),
    dict(kernel=(2, 3), groups=2, padding=(1, 2, 0, 3), stride=(1, 2), dilation=(2, 1),
         dropout_p=0.3, training=True),
    dict(padding=1, dropout_p=0.2),
    dict(kernel=2, groups=2, stride=2, dropout_p=0.2),
    dict(padding=1, groups=2),
]


@pytest.mark.parametrize('epilogue', EPILOGUES)
@pytest.mark.parametrize('options', GRADCHECKS)
def test_gradcheck(options, epilogue):
    inputs, options = make_case(out=4, size=(5, 6), **options, **epilogue)

    def seeded(*inputs):
        torch.manual_seed(1)
        return kn_conv2d(*inputs[:3], residual=inputs[3] if inputs[3:] else None, **options)

    assert torch.autograd.gradcheck(seeded, inputs)


@pytest.mark.parametrize('options', [
    dict(kernel_size=1, dropout_p=0.1, training=True),
    dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0, 2, 1), dropout_p=0.25, training=True),
    dict(kernel_size=2, stride=2, dropout_p=0.25),
])
def test_gradcheck_kernel_norm2d(options):
    x = make_case(size=(5, 6))[0][0]

    def seeded(x):
        torch.manual_seed(1)
        return kernel_norm2d(x, **options)

    assert torch.autograd.gradcheck(seeded, (x, ))
    if not options.get('training'):
        torch.testing.assert_close(seeded(x), kernel_norm2d(x, impl='reference', **options))


def gradients_through(activation, inputs, **options):
    leaves = [t.detach().requires_grad_() for t in inputs]
    activation(kn_conv2d(*leaves, **options)).square().sum().backward()
    return [t.grad for t in leaves]


@BOTH_FORMS
def test_inplace_activation_after_it():
    inputs, options = make_case(padding=1)
    for a, b in zip(gradients_through(torch.relu_, inputs, **options),
                    gradients_through(torch.relu, inputs, **options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('impl', PASSES)
@pytest.mark.parametrize('kept', [dict(keep_output=True), dict(activation='relu'),
                                  dict(keep_output=True, residual=True)])
def test_what_is_kept_and_overwritten_stops_backward(kept, impl):
    """An error and no wrong gradient: torch counts the versions of what is saved."""
    (x, weight, bias, *rest), options = make_case(
        kernel=1, dtype=torch.float32, device=DEVICE if impl == 'triton' else 'cpu', **kept)
    residual = rest[0] + 0 if rest else None
    options['residual'] = residual
    y = kn_conv2d(x, weight, bias, impl=impl, **options)
    (residual if rest else y).detach().mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()


@pytest.mark.parametrize('impl', PASSES)
def test_what_is_kept(impl):
    """The maps of the neighbours, and no other map."""
    (x, weight, bias, residual), options = make_case(
        kernel=1, dtype=torch.float32, channels=8, residual=True,
        device=DEVICE if impl == 'triton' else 'cpu')
    for own, call in ((1, dict()), (0, dict(keep_output=True)), (0, dict(activation='relu')),
                      (0, dict(keep_output=True, residual=residual)),
                      (0, dict(keep_output=True, input_activation='relu'))):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = kn_conv2d(x, weight, bias, impl=impl, **options, **call)
        known = {t.data_ptr() for t in (x, residual, y)}
        maps = [t for t in saved if t.shape == y.shape and t.data_ptr() not in known]
        assert len(maps) == own, call


@ALL_FORMS
@pytest.mark.parametrize('activation', [None, 'relu'])
@pytest.mark.parametrize('keep_output', [False, True])
def test_gradients_of_parameters_alone(keep_output, activation, impl):
    """The first layer of a network keeps no output, because its image needs no gradient."""
    inputs, options = make_case(kernel=3, padding=1, dtype=torch.float32,
                                device=DEVICE if impl == 'triton' else 'cpu')
    _, _, *expected = run(inputs, impl, activation=activation, **options)
    weight, bias = (t.detach().requires_grad_() for t in inputs[1:])
    y = kn_conv2d(inputs[0].detach(), weight, bias, impl=impl, activation=activation,
                  keep_output=keep_output, **options)
    y.backward(golden.signal(y.shape, seed=1).to(y))
    for a, e in zip((weight.grad, bias.grad), expected, strict=True):
        torch.testing.assert_close(a, e)


@BOTH_FORMS
def test_gradient_of_the_residual_alone():
    (x, weight, bias, residual), _ = make_case(residual=True)
    y = kn_conv2d(x.detach(), weight.detach(), bias.detach(), residual=residual)
    assert torch.equal(torch.autograd.grad(y.sum(), residual)[0], torch.ones_like(residual))


@BOTH_FORMS
def test_backward_under_autocast_and_twice():
    inputs, options = make_case(padding=1, dtype=torch.float32)
    y = kn_conv2d(*inputs, **options)
    grad = torch.ones_like(y).cumsum(1)
    plain = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    with torch.autocast('cpu', torch.bfloat16):
        for a, b in zip(torch.autograd.grad(y, inputs, grad), plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('channels', [3, 64, 201])
@pytest.mark.parametrize('impl', PASSES)
def test_the_gradient_of_units_without_variance_is_cleared(impl, channels, layout):
    device = DEVICE if impl == 'triton' else 'cpu'
    h = torch.randn(2, channels, 5, 7, dtype=torch.bfloat16).to(device, memory_format=layout)
    live = torch.rand(2, 5, 7, device=device) > 0.3
    expected = torch.where(live[:, None], h, 0)
    PASSES[impl].clear_dead(h, live)
    assert torch.equal(h, expected) and (h == 0).any()
