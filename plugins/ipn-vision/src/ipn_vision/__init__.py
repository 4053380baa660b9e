"""Perceivers on Hugging Face vision towers."""
