"""Figures that an accuracy needs beside it: calibration, intervals, tests between runs, slices. Arrays come in."""
