"""Converts the authors' checkpoints (repository norm-torch), and ConvNeXt's. See --help."""
import argparse

import torch

from mmseg_kn.checkpoints.norm_torch import convert_file


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Converts norm-torch's checkpoints of KNResNet-18, 34, 50 and of KNConvNeXt; "
        "and torchvision's or mmpretrain's of ConvNeXt to a KNConvNeXt whose three downsamplings "
        'start from scratch. The name of the file written ends in the first eight digits of its '
        'SHA-256.')
    parser.add_argument('src', help='checkpoint of norm-torch, torchvision or mmpretrain')
    parser.add_argument('dst', help='file to write, NAME.pth')
    parser.add_argument('--classifier', action='store_true',
                        help='the whole classifier, for KNResNetClassifier or mmpretrain, '
                        'instead of the backbone')
    parser.add_argument('--activation', default='relu',
                        help='what a KNResNet was trained with, which its weights do not tell: '
                        "mish for the authors' private ones (%(default)s)")
    args = parser.parse_args()
    try:
        path, size = convert_file(args.src, args.dst, args.classifier, args.activation)
    except (ValueError, OSError) as error:
        parser.exit(1, f'{error}\n')
    weights = torch.load(path, weights_only=True)['state_dict']
    convnext = isinstance(size, str)
    new = convnext and not any('downsample_layers.1.' in key for key in weights)
    network = 'ConvNeXt' if new else 'KNConvNeXt' if convnext else 'KNResNet'
    print(f'{args.src} is {network}-{size}; written to {path}')
    if new:
        print('It has no weights for the three kernel normalized downsamplings: they start from '
              'scratch, so train it before you use it.')
    stem = weights.get('backbone.stem.weight')
    if args.activation == 'relu' and stem is not None and stem.shape[2:] == (3, 3):
        print("Its activation is taken to be ReLU. Networks of the authors' private training have "
              'the same names and shapes: --activation mish converts those.')
    if args.classifier:
        strict = ', strict=False' * new
        print(f'net.load_state_dict(torch.load({str(path)!r})["state_dict"]{strict})')
    else:
        arguments = f'arch={size!r}' if convnext else f'depth={size}'
        if args.activation != 'relu':
            arguments += f', activation={args.activation!r}'
        print(f"In model.backbone: {arguments}, init_cfg=dict(type='Pretrained', "
              f'checkpoint={str(path)!r})')
        print('or: --cfg-options model.backbone.init_cfg.type=Pretrained '
              f'model.backbone.init_cfg.checkpoint={path}')


if __name__ == '__main__':
    main()
