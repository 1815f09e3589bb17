"""Made-up texts with facts and passages that can be asked for: training data and test problems."""
