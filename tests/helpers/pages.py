"""The pages of the documentation."""
from program import ROOT

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(ROOT.glob('docs/*.md')),
         *sorted(ROOT.glob('configs/*/README.md'))]
