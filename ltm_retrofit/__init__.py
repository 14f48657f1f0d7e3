"""Retrofit pretrained vision transformers with learnable token merging.

>>> import ltm_retrofit as ltm
>>> model = ltm.retrofit(model, ltm.LTMConfig(flops=0.7))  # doctest: +SKIP

These names are the public surface; every other one is private. Nothing heavy is imported until it is used: the names
and their homes stand in `__init__.pyi`.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("ltm-retrofit")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
