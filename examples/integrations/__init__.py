"""Surgery inside the frameworks that people train with: one short loop for each.

Lightning and transformers import torchvision where it is installed, so it is made to import first.
"""

from importlib.util import find_spec

from examples.torchvision_import import import_torchvision

if find_spec("torchvision") is not None:
    import_torchvision()
