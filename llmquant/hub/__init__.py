"""Publishing: model cards and uploads."""
