"""Self-supervised denoising of single-cell counts: the data say how much to denoise, and what it gained.

Noise2Self (Batson & Royer 2019) for scanpy. Names are loaded when they are first used; `__init__.pyi` lists them.
"""

import lazy_loader

from ._scanpy_external import attach

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
attach()
del attach, lazy_loader
