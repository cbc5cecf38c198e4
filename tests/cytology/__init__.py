"""Tests of the cytology application."""
