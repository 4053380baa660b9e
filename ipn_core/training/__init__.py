"""Training: stages with objectives, on accelerate, resumable bit for bit."""
