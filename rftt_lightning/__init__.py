"""Reinforced Functional Token Tuning (arXiv 2502.13389) on Lightning. Read ``core/contracts.py`` first."""

__version__ = "0.1.0"
