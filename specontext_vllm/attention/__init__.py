"""Attention over page tables: the providers behind one small interface."""
