"""For tests of plugins: a tiny encoder, tiny backbones and interactions, damaged checkpoints."""
