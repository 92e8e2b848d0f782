"""The engine behind TorchServe and behind Triton."""
