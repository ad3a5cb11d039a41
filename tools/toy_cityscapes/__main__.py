"""The command line: python tools/toy_cityscapes --help."""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a folder that is run is no package

from toy_cityscapes import generate  # noqa: E402


def main(args=None):
    """Run the command line with a list of arguments, by default those of the process."""
    parser = argparse.ArgumentParser(
        prog='python tools/toy_cityscapes',
        description='Write generated street scenes in the Cityscapes layout.')
    parser.add_argument('root', help='folder to write, new or empty')
    parser.add_argument('--train', type=int, default=400, help='training scenes (%(default)s)')
    parser.add_argument('--val', type=int, default=100, help='validation scenes (%(default)s)')
    parser.add_argument('--size', type=int, nargs=2, default=(128, 256), metavar=('H', 'W'),
                        help='height and width in pixels (128 256)')
    parser.add_argument('--seed', type=int, default=0, help='same seed, same bytes (%(default)s)')
    parser.add_argument('--workers', type=int, default=1, help='processes (%(default)s)')
    parser.add_argument('--force', action='store_true',
                        help='replace a set that this tool wrote; other files are kept')
    options = parser.parse_args(args)
    try:
        summary = generate(**vars(options), progress=True)
    except ValueError as error:
        parser.error(str(error))
    shares = summary['shares']
    print(f'{summary["files"]} files in {options.root}; share of pixels in %:')
    print(f'{"":14}{"train":>7}{"val":>7}')
    for name, share in shares['train'].items():
        print(f'{name:14}{100 * share:7.2f}{100 * shares["val"][name]:7.2f}')


if __name__ == '__main__':
    main()
