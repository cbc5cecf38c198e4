"""A run folder small enough to be trained on in a second."""

from examples.slam_ags_cytology.bags import BagsConfig, bags
from examples.slam_ags_cytology.synthetic import SyntheticConfig, synthetic


def draw_tiny(out):
    """Draw cells of 32 pixels, and 4 + 4 training bags of 10 of them, into OUT; return OUT."""
    cells = synthetic(SyntheticConfig(out, normal=180, abnormal=40, size=32))
    shapes = {"bag_size": 10, "witness_rate": 0.2, "train_bags": 4, "val_bags": 1, "test_bags": 1}
    classes = {"normal": ("LYT", "MON", "NGS"), "positive": ("BLA", "PMO")}
    bags(BagsConfig(out, cells=cells, **classes, **shapes))
    return out
