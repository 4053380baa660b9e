"""IPN models as a model of lmms-eval, `--model ipn`, and IPN tasks as tasks of lmms-eval."""
