"""The starter: a trained model on real LLM weights, and the tasks it was trained on."""
