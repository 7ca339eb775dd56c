"""Talking with a model: in the terminal, and on a web page on which teacher and student answer side by side."""
