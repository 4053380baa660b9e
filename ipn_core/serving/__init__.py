"""`ipn serve`: one model behind an OpenAI-compatible address, many questions in one batch."""
