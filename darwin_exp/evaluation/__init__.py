"""Turns a genome into a judged model: training, scoring, integrity checks and speed."""
