"""Ablation: takes a champion apart and measures what each part of its change contributes."""
