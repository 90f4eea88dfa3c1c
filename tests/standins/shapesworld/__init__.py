"""A small world of drawn shapes, with models trained on it in real file formats."""
