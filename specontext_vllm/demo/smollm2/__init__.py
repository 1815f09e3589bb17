"""`make demo-smollm2`: a published model, fetched from the package index, on a real text."""
