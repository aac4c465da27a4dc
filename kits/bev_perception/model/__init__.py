"""BEVFormer: its sizes, layers, weights, memory over time, and training targets."""
