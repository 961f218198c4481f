"""Building blocks with weights: layers, attention, ResNet and transformer blocks."""
