"""Pure PyTorch language models: no Ray, no Prefect, no MLflow, no sibling packages."""
