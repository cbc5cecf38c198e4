"""Runnable examples; the library itself never imports them."""
