"""Trains a segmentor: mmseg's tools/train.py with mmseg_kn imported. See --help."""
import mmseg_script

import mmseg_kn  # noqa: F401

if __name__ == '__main__':
    mmseg_script.run('train.py')
