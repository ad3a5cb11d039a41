"""Converts the authors' ImageNet checkpoints (repository norm-torch) to KNResNet. See --help."""
import argparse

from mmseg_kn.checkpoints.norm_torch import convert_file


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Converts norm-torch's checkpoints of KNResNet-18, 34 and 50. The name of the "
        'file written ends in the first eight digits of its SHA-256.')
    parser.add_argument('src', help='checkpoint of norm-torch')
    parser.add_argument('dst', help='file to write, NAME.pth')
    parser.add_argument('--classifier', action='store_true',
                        help='the whole classifier, for KNResNetClassifier or mmpretrain, '
                        'instead of the backbone')
    args = parser.parse_args()
    try:
        path, depth = convert_file(args.src, args.dst, args.classifier)
    except (ValueError, OSError) as error:
        parser.exit(1, f'{error}\n')
    print(f'{args.src} is KNResNet-{depth}; written to {path}')
    if args.classifier:
        print(f'net.load_state_dict(torch.load({str(path)!r})["state_dict"])')
    else:
        print(f"In model.backbone: depth={depth}, init_cfg=dict(type='Pretrained', "
              f'checkpoint={str(path)!r})')
        print('or: --cfg-options model.backbone.init_cfg.type=Pretrained '
              f'model.backbone.init_cfg.checkpoint={path}')


if __name__ == '__main__':
    main()
