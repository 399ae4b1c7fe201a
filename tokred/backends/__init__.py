"""Lowering: what runs the rewritten graph. Backends know neither methods nor models."""

from tokred.backends.lower import lower

__all__ = ["lower"]
