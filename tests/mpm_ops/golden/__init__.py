"""Outputs of the original Segmenter, recorded once; see record.py."""
