"""Writes the tables in configs/*/README.md from configs/*/metafile.yaml.

    python tools/dev/config_tables.py          # after a metafile has changed
    python tools/dev/config_tables.py --check  # writes nothing; exits with 1 if a table is stale

A table stands between two comments. The first one names the data set whose configs the table
lists, "private" for the configs of private training, "paper" for those of the paper's Table 3, or
"kernelized" for those over a config of mmseg, which are named as that with "-kn" before the
schedule. A row says what the name of a config
says, and the mIoU that the metafile has for it. Rows keep the order of the metafile.
"""
import argparse
import re
import sys
from pathlib import Path

import mmengine

ROOT = Path(__file__).parents[2]
TABLE = re.compile(r'(<!-- table of (\S+), [^\n]* -->\n).*?(<!-- end of the table -->)', re.S)
NAME = re.compile(
    r'\w+_(?P<kn>kn)?r(?P<depth>\d+)(-(?P<norm>[a-z-]+))?-d(?P<stride>8|32)_(?P<batch>\d+xb\d+)'
    r'(?P<private>-dp-eps\d+)?-(?P<length>\d+[ke]?)_(?P<data>[a-z-]+)-(?P<crop>\d+x\d+)')
CONVNEXT = re.compile(
    r'(?P<kn>kn)?convnext-(?P<arch>[a-z]+)(-(?P<norm>[a-z]+))?_upernet_(?P<batch>\d+xb\d+)-'
    r'(?P<length>\d+k?)_(?P<data>[a-z0-9]+)-(?P<crop>\d+x\d+)')
KERNELIZED = re.compile(
    r'(?P<network>\w[\w-]*)-kn_(?P<batch>\d+xb\d+)-(?P<length>\d+k?)_(?P<data>[a-z-]+)-'
    r'(?P<crop>\d+x\d+)')
NORMS = {
    'kn': 'KernelNorm',
    'bn': 'BatchNorm',
    'gn': 'GroupNorm, 32 groups',
    'gn-ws': 'GroupNorm, 32 groups, and weight standardization',
    'ln': 'LayerNorm',
    'nonorm': 'none, scale and shift alone',
    'plainpool': 'BatchNorm, none in the pooling branch',
}
DATA = {'cityscapes': 'Cityscapes', 'camvid': 'CamVid', 'toy-cityscapes': 'Generated scenes',
        'ade20k': 'ADE20K'}


def parts_of(name: str) -> dict[str, str | None]:
    """What the name of a config says."""
    found = NAME.fullmatch(name) or KERNELIZED.fullmatch(name) or CONVNEXT.fullmatch(name)
    if not found or found['data'] not in DATA or found.groupdict().get('norm') not in (
            None, *NORMS):
        raise ValueError(
            'a config must be named METHOD_[kn]rDEPTH[-NORM]-d8_SCHEDULE_DATA-CROP, or d32, or '
            'METHOD_BACKBONE-kn_SCHEDULE_DATA-CROP over one of mmseg, or '
            '[kn]convnext-ARCH[-NORM]_upernet_SCHEDULE_DATA-CROP, with NORM of '
            f'{", ".join(NORMS)} and DATA of {", ".join(DATA)}, got {name!r}; rename it, or add '
            f'its normalization or data set to {Path(__file__).name}')
    return found.groupdict()


def table_of(name: str) -> str:
    """The table in which a config is listed."""
    parts = parts_of(name)
    if 'network' in parts:
        return 'kernelized'
    if parts.get('stride') == '32':
        return 'paper'
    return 'private' if parts.get('private') else parts['data']


def row(model: dict) -> dict[str, str]:
    """Column -> cell for a model of a metafile."""
    parts = parts_of(model['Name'])
    results = model.get('Results', {}).get('Metrics', {})
    if 'network' in parts:
        network = {'Network of mmseg': parts['network']}
    elif 'arch' in parts:
        network = {'Backbone': f'{"KN" if parts["kn"] else ""}ConvNeXt, {parts["arch"]}'}
        if parts['data'] == 'camvid':  # where there are twins
            network['Normalization'] = (
                'KernelNorm in downsamplings and heads' if parts['kn'] else
                f'LayerNorm, heads: {NORMS[parts["norm"] or "bn"]}')
    else:
        network = {
            'Backbone': f'{"KN" if parts["kn"] else ""}ResNet-{parts["depth"]}',
            'Normalization': NORMS[parts['norm'] or ('kn' if parts['kn'] else 'bn')],
        }
    return {
        'Data': DATA[parts['data']],
        **network,
        'Crop': parts['crop'],
        'Schedule': f'{parts["batch"]}, {parts["length"]}',
        'mIoU': str(results.get('mIoU', '-')),
        'Config': f'[config]({Path(model["Config"]).name})',
    }


def table(name: str, models: list[dict]) -> str:
    """The table of that name, in Markdown."""
    rows = [row(model) for model in models if table_of(model['Name']) == name]
    if not rows:
        raise ValueError(f'a table must have rows, got none for {name!r}; take its comments out '
                         'of the README, or correct the name in them')
    columns = [column for column in rows[0] if column != 'Data' or name == 'private']
    lines = [columns, ['---'] * len(columns), *([cells[c] for c in columns] for cells in rows)]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def with_tables(text: str, models: list[dict]) -> str:
    """The text of a README with its tables written again."""
    missing = {table_of(model['Name']) for model in models} - {m[2] for m in TABLE.finditer(text)}
    if missing:
        raise ValueError('the README must have a table for each config of its metafile, got none '
                         f'for {", ".join(sorted(missing))}; add the two comments around it')
    return TABLE.sub(lambda found: f'{found[1]}\n{table(found[2], models)}\n{found[3]}', text)


def stale(root: Path) -> dict[Path, str]:
    """The READMEs of a checkout whose tables differ from the metafiles -> what they should be."""
    wanted = {}
    for readme in sorted(root.glob('configs/*/README.md')):
        models = mmengine.load(readme.with_name('metafile.yaml'))['Models']
        text = readme.read_text()
        if (new := with_tables(text, models)) != text:
            wanted[readme] = new
    return wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--check', action='store_true',
                        help='write nothing; name each README with a stale table')
    check = parser.parse_args().check
    found = stale(ROOT)
    for readme, text in found.items():
        name = readme.relative_to(ROOT)
        if check:
            print(f'{name}: the tables are not those of {name.with_name("metafile.yaml")}; '
                  'run python tools/dev/config_tables.py')
        else:
            readme.write_text(text)
            print(f'{name}: written')
    sys.exit(1 if check and found else 0)


if __name__ == '__main__':
    main()
