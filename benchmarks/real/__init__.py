"""Case `real`: a real model on real text, each decode step reading only what a retriever chose."""
