"""Retrofit pretrained vision transformers with learnable token merging.

>>> import timm
>>> import ltm_retrofit as ltm
>>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4)
>>> model = ltm.retrofit(model, ltm.LTMConfig(flops=0.7))

These names are the public surface; every other one is private. Nothing heavy is imported until it is used: the names
and their homes stand in `__init__.pyi`.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("ltm-retrofit")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
