"""The `rvii` strategy: a small transformer that takes the LLM's request to the image."""
