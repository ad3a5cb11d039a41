"""Generates street scenes in Cityscapes layout. See --help."""
from mmseg_kn.toy_cityscapes.__main__ import main

if __name__ == '__main__':
    main()
