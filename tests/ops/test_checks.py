"""Bad input."""
import pytest
import torch

from mmseg_kn.ops import kernel_norm2d, kn_conv2d

X = torch.zeros(1, 4, 8, 8)
W = torch.zeros(6, 4, 3, 3)


@pytest.mark.parametrize('call, message', [
    (lambda: kn_conv2d(X[0], W), r'4-D .*\(4, 8, 8\)'),
    (lambda: kn_conv2d(X.byte(), W), 'floating point, got torch.uint8'),
    (lambda: kn_conv2d(X[..., :2], W), r'larger than the padded input 8 x 2'),
    (lambda: kn_conv2d(X, W, dilation=4), r'dilation=\(4, 4\) is larger'),
    (lambda: kn_conv2d(X, W[:, :3]), 'input has 4 channels'),
    (lambda: kn_conv2d(X, W, groups=4), 'out_channels=6 must be divisible by groups=4'),
    (lambda: kn_conv2d(X, W, torch.zeros(4)), r'bias must have shape \(6,\), got \(4,\)'),
    (lambda: kn_conv2d(X, W, dropout_p=1.0), r'dropout_p must be in \[0, 1\), got 1.0'),
    (lambda: kn_conv2d(X, W, dropout_p=-0.1), 'dropout_p must be'),
    (lambda: kn_conv2d(X, W, eps=0), 'eps must be > 0'),
    (lambda: kn_conv2d(X, W, eps=float('nan')), 'eps must be > 0, got nan'),
    (lambda: kn_conv2d(X.numpy(), W), 'input must be a torch.Tensor, got ndarray'),
    (lambda: kn_conv2d(X, W, 0.5), 'bias must be a torch.Tensor, got float'),
    (lambda: kn_conv2d(X, W[:0]), 'out_channels=0 must be'),
    (lambda: kn_conv2d(X[:, :0], W[:, :0]), 'must have channels and pixels'),
    (lambda: kernel_norm2d(X[..., :0], padding=1), r'pixels, got shape \(1, 4, 8, 0\)'),
    (lambda: kn_conv2d(X, W, groups=None), 'groups must be an int >= 1, got None'),
    (lambda: kn_conv2d(X, W[0]), 'weight must be 4-D'),
    (lambda: kn_conv2d(X, W.to('meta')), 'weight must be on one device, got cpu and meta'),
    (lambda: kn_conv2d(X, W, torch.zeros(6).to('meta')), 'bias must be on one device, got cpu'),
    (lambda: kn_conv2d(X, W, residual=torch.zeros(1, 6, 6, 6).to('meta')),
     'residual must be on one device, got cpu and meta'),
    (lambda: kn_conv2d(X, W.double()), 'one dtype, got torch.float32 and torch.float64'),
    (lambda: kn_conv2d(X, W, stride=0), 'stride must be .* got 0'),
    (lambda: kn_conv2d(X, W, stride=1.5), 'stride must be .* got 1.5'),
    (lambda: kn_conv2d(X, W, padding=(1, 2, 3)), r'padding must be .* got \(1, 2, 3\)'),
    (lambda: kn_conv2d(X, W, padding=(0, 0, 0, -1)), 'padding must be'),
    (lambda: kn_conv2d(X, W, padding='reflect'), "padding must be .* got 'reflect'"),
    (lambda: kn_conv2d(X, W, padding='same', stride=2), "padding='same' needs stride 1"),
    (lambda: kn_conv2d(X, W, impl='cudnn'), "impl must be one of .* got 'cudnn'"),
    (lambda: kn_conv2d(X.double(), W.double(), impl='triton'),
     r"impl='triton' cannot run here: .* got torch.float64; use impl='auto'"),
    (lambda: kn_conv2d(X, W, activation='gelu'), "activation must be None or 'relu', got 'gelu'"),
    (lambda: kn_conv2d(X, W, residual=X), r'shape of the output, \(1, 6, 6, 6\), got \(1, 4,'),
    (lambda: kn_conv2d(X, W, residual=X, activation='relu'), 'exclude each other'),
    (lambda: kernel_norm2d(X, kernel_size=9), 'larger than the padded input 8 x 8'),
    (lambda: kernel_norm2d(X, kernel_size=(1, 2, 3)), 'kernel_size must be'),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
