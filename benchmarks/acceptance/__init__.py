"""Case `acceptance`: how many of the drafts that a real model makes over the selected pages it
accepts when it reads its whole context: lossless mode on real text.
"""
