"""Answers as HTML: in a notebook, in a file of its own (`ipn ask --trace`), on the web page."""
