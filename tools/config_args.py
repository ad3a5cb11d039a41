"""What the tools that read a config share: their arguments, and the config that these give."""
import argparse

from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings


def add_config_args(parser: argparse.ArgumentParser, help: str, several: bool = False) -> None:
    """Adds ``config``, or with ``several`` ``configs``, and ``--cfg-options``."""
    if several:
        parser.add_argument('configs', nargs='+', help=help)
    else:
        parser.add_argument('config', help=help)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        help=f'override settings of {"every" if several else "the"} config, as '
                        'in train.py and test.py')


def load_config(path: str, cfg_options: dict | None) -> Config:
    """The config of a file with these options, ready for its modules to be built."""
    return merge_options(Config.fromfile(path), cfg_options)


def merge_options(cfg: Config, cfg_options: dict | None) -> Config:
    """Puts options into a config, and imports and chooses the registries that it builds from."""
    if cfg_options:
        cfg.merge_from_dict(cfg_options)
    if cfg.get('custom_imports'):
        import_modules_from_strings(**cfg.custom_imports)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    return cfg
